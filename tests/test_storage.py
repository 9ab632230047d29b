"""The .kvz file: whole, checked, and never loaded wrongly."""

import json
import random
import resource
import struct
import zlib
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvzip import KVzipError, ModelKVzip, storage
from kvzip.cache import Scores
from models import (
    QUESTIONS,
    TEXT,
    assert_same,
    logits_of,
    make_hf_model,
    make_model,
    make_tokenizer,
    random_ids,
    shared_model,
    snapshot,
)

KINDS = ["llama", "gemma3"]


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small pruned cache of the llama model."""
    return shared_model().prefill(random_ids(20)).prune(0.4).save(tmp_path / "context.kvz")


def header_size(path: Path) -> int:
    """Bytes of a safetensors file in front of its tensors."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def rewrite(path: Path, change) -> None:
    """Change tensors and metadata of a file, `change(tensors, metadata)`."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def set_header(metadata: dict[str, str], **changes) -> None:
    """Change the header as somebody would who knows of its checksum."""
    text = json.dumps({**json.loads(metadata["kvzip"].partition(" ")[2]), **changes})
    metadata.update(kvzip=f"{zlib.crc32(text.encode()):08x} {text}")


class TestRoundTrip:
    def test_a_retaining_model_retains_what_a_file_holds(self, tmp_path):
        model = make_model(kv_type="retain")
        kv = model.prefill(TEXT)
        again = model.load(kv.save(tmp_path / "full.kvz"))
        for ratio in (0.3, 0.7, 0.1):
            assert torch.equal(again.prune(ratio).kept, kv.prune(ratio).kept)
        held = model.load(kv.prune(0.5).save(tmp_path / "half.kvz"))
        held.prune(0.2)
        assert torch.equal(held.prune(0.4).kept, kv.prune(0.4).kept)
        with pytest.raises(KVzipError, match="already evicted"):
            held.prune(0.6)

    def test_equal_caches_make_equal_files_with_ordinary_permissions(self, tmp_path):
        kv = shared_model().prefill(TEXT).prune(0.5)
        one, other = kv.save(tmp_path / "one.kvz"), kv.save(tmp_path / "other.kvz")
        assert one.read_bytes() == other.read_bytes()
        ordinary = tmp_path / "ordinary"
        ordinary.touch()
        assert one.stat().st_mode == ordinary.stat().st_mode

    @pytest.mark.parametrize("ratio", [None, 1.0, 0.4, 1e-9], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_is_there_again(self, kind, ratio, tmp_path):
        model = shared_model(kind)
        kv = model.prefill(TEXT)
        if ratio is not None:
            kv.prune(ratio)
        path = kv.save(tmp_path / "context.kvz")
        again = model.load(str(path))
        assert_same(snapshot(again), snapshot(kv))
        assert again.document.prefix_length == kv.document.prefix_length
        assert again.origin == kv.origin
        assert again.scores.scorer == "reconstruction"
        assert torch.equal(again.scores.values[again.kept], kv.scores.values[kv.kept])
        query = model.apply_template(QUESTIONS[0])
        assert torch.equal(logits_of(model, again, query), logits_of(model, kv, query))

    @pytest.mark.parametrize("level", ["pair", "pair-uniform"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_can_be_pruned_further(self, kind, level, tmp_path):
        model = shared_model(kind)
        kv = model.prefill(TEXT).prune(0.6, level)
        again = model.load(kv.save(tmp_path / "context.kvz")).prune(0.2, level)
        assert_same(snapshot(again), snapshot(kv.prune(0.2, level)))
        with pytest.raises(KVzipError, match="already evicted"):
            again.prune(0.6, level)

    def test_head_scores(self, tmp_path):
        model = shared_model()
        kv = model.read(TEXT)
        values = torch.rand(3, 2, 1).expand(-1, -1, kv.document.context_length)
        kv.scores = Scores(values, "heads")
        kv.prune(0.5, level="head")
        again = model.load(kv.save(tmp_path / "context.kvz"))
        assert again.scores.scorer == "heads"
        assert_same(snapshot(again.prune(0.34, "head")), snapshot(kv.prune(0.34, "head")))

    def test_a_retaining_cache_saves_what_it_keeps(self, tmp_path):
        model = make_model(kv_type="retain")
        kv = model.prefill(TEXT).prune(0.3)
        again = model.load(kv.save(tmp_path / "context.kvz"))
        assert torch.equal(again.held, again.kept)
        assert_same(snapshot(again), snapshot(shared_model().prefill(TEXT).prune(0.3)))

    def test_without_scores(self, tmp_path):
        model = shared_model()
        again = model.load(model.read(TEXT).save(tmp_path / "context.kvz"))
        assert again.scores is None

    def test_the_tail_is_not_part_of_it(self, tmp_path):
        model = shared_model()
        kv = model.read(TEXT)
        before = snapshot(kv)
        model.generate(QUESTIONS[0], kv=kv, update_cache=True, max_new_tokens=4)
        assert_same(snapshot(model.load(kv.save(tmp_path / "context.kvz"))), before)

    def test_dtype_of_the_model_at_hand(self, tmp_path):
        model = shared_model("qwen2")
        # weights that bfloat16 holds exactly: the same checkpoint in two dtypes
        weights = make_hf_model("qwen2").to(torch.bfloat16)
        half = ModelKVzip(make_hf_model("qwen2").to(torch.bfloat16), make_tokenizer())
        full = ModelKVzip(weights.float(), make_tokenizer())
        assert half.origin.fingerprint == full.origin.fingerprint == model.origin.fingerprint
        kv = half.prefill(TEXT).prune(0.5)
        assert kv.origin.dtype == "bfloat16"
        again = full.load(kv.save(tmp_path / "context.kvz"))
        assert again.origin.dtype == "float32"
        assert torch.equal(again.kept, kv.kept)
        for layer, other in zip(again.layers, kv.layers, strict=True):
            for tensor, held in zip(layer.context_tensors(), other.context_tensors(), strict=True):
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, held.float())
        full.generate(QUESTIONS[0], kv=again, max_new_tokens=4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_layout_of_the_file(self, kind, tmp_path):
        """Readable with safetensors alone, as the module's docstring says."""
        kv = shared_model(kind).prefill(TEXT).prune(0.4)
        tensors = load_file(kv.save(tmp_path / "context.kvz"))
        assert torch.equal(tensors.pop("token_ids"), kv.document.token_ids)
        p = kv.document.prefix_length
        kept, scores = iter(kv.kept), iter(kv.scores.values)
        for i, layer in enumerate(kv.layers):
            parts = [tensors.pop(f"layers.{i}.{name}") for name in ("keys", "values")]
            packed = [part.flatten(0, -2) for part in parts]
            assert all(map(torch.equal, packed, layer.context_tensors()))
            if layer not in kv.prunable:
                continue
            positions, rows = next(kept), tensors.pop(f"layers.{i}.scores")
            expected = [[*range(p), *(p + head.nonzero().flatten()).tolist()] for head in positions]
            lengths = [0, *torch.tensor([len(head) for head in expected]).cumsum(0).tolist()]
            assert tensors.pop(f"layers.{i}.indptr").tolist() == lengths
            assert tensors.pop(f"layers.{i}.positions").tolist() == [*chain(*expected)]
            row_scores = [
                torch.cat([torch.full((p,), torch.inf), head_scores[head]])
                for head_scores, head in zip(next(scores), positions, strict=True)
            ]
            assert torch.equal(rows, torch.cat(row_scores))
        assert not tensors

    def test_header_and_lengths_need_no_model(self, saved):
        header, kv = storage.read_header(saved), shared_model().load(saved)
        assert header.context_tokens == 20
        assert header.prefix_length == kv.document.prefix_length
        assert header.origin.model_id == "LlamaForCausalLM"
        assert (header.ratio, header.realised_ratio) == (0.4, kv.realised_ratio)
        assert header.windows == [None] * 3
        expected = header.prefix_length + kv.kept.sum(-1)
        assert torch.equal(storage.read_lengths(saved), expected)


class TestDamage:
    """Whatever happens to a file, loading it is a KVzipError or gives what was saved."""

    def load(self, path: Path) -> str | None:
        """The error's text, or None if the file was loaded."""
        try:
            shared_model().load(path)
        except KVzipError as error:
            return str(error)
        return None

    def test_truncated(self, saved):
        data = saved.read_bytes()
        head = header_size(saved)
        ends = [*range(0, 12), *range(12, head, 97), head - 1, head, head + 1]
        ends += [*range(head, len(data), (len(data) - head) // 40), len(data) - 1]
        for end in ends:
            saved.write_bytes(data[:end])
            assert self.load(saved), end

    def test_longer(self, saved):
        saved.write_bytes(saved.read_bytes() + b"\0")
        assert self.load(saved)

    def damage(self, saved: Path, places: list[tuple[int, int]]) -> None:
        """Put one other byte at each place; the file is refused or equals what was saved."""
        data = saved.read_bytes()
        expected = snapshot(shared_model().load(saved))
        refused = 0
        for place, byte in places:
            if data[place] == byte:
                continue
            saved.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
            if self.load(saved):
                refused += 1
            else:
                kv = shared_model().load(saved)
                assert_same(snapshot(kv), expected)
        assert refused > 0.95 * len(places)

    def test_bytes_of_the_length(self, saved):
        data = saved.read_bytes()
        self.damage(saved, [(i, data[i] ^ flip) for i in range(8) for flip in (1, 2, 0x80, 0xFF)])

    def test_bytes_of_the_header(self, saved):
        choose, data = random.Random(0), saved.read_bytes()
        places = [
            (i, choose.choice([data[i] ^ 1, data[i] ^ 0x80, choose.randrange(256)]))
            for i in choose.sample(range(8, header_size(saved)), 600)
        ]
        self.damage(saved, places)

    def test_letters_of_dtypes(self, saved):
        """Another dtype of the same width would give other numbers of the same bytes."""
        data, places = saved.read_bytes(), []
        for dtype in (b'"F32"', b'"I32"', b'"I64"'):
            start = data.find(dtype)
            while 0 <= start < header_size(saved):
                places += [(start + 1, letter) for letter in b"FIU"]
                start = data.find(dtype, start + 1)
        assert len(places) > 30
        self.damage(saved, [(i, byte) for i, byte in places if data[i] != byte])

    def test_bytes_of_the_tensors(self, saved):
        choose, size = random.Random(1), saved.stat().st_size
        data = saved.read_bytes()
        places = [choose.randrange(header_size(saved), size) for _ in range(150)]
        self.damage(saved, [(i, data[i] ^ (1 << choose.randrange(8))) for i in places])

    @pytest.mark.parametrize(
        "name", ["token_ids", "layers.0.keys", "layers.1.indptr", "layers.2.scores"]
    )
    def test_missing_tensor(self, saved, name):
        rewrite(saved, lambda tensors, _: tensors.pop(name))
        assert f"tensor {name} is missing" in self.load(saved)

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.update({"layers.0.keys": t["layers.0.keys"].view(-1, 8)}),
            lambda t: t.update({"token_ids": t["token_ids"][None]}),
            lambda t: t.update({"layers.1.keys": t["layers.0.keys"].clone()}),
        ],
        ids=["folded", "another-rank", "another-layer"],
    )
    def test_tensors_of_another_shape(self, saved, change):
        rewrite(saved, lambda tensors, _: change(tensors))
        assert "is damaged: the checksum" in self.load(saved)

    @pytest.mark.parametrize(
        "changes",
        [
            {"prefix_length": "many"},
            {"windows": None},
            {"checksums": 3},
            {"origin": {"model_id": "x"}},
            {"origin": None},
            {"unknown": 1},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_headers_that_make_no_sense(self, saved, changes):
        rewrite(saved, lambda _, metadata: set_header(metadata, **changes))
        assert "is damaged" in self.load(saved)

    def test_a_header_that_is_no_json(self, saved):
        def change(_, metadata):
            metadata.update(kvzip=f"{zlib.crc32(b'{'):08x} {{")

        rewrite(saved, change)
        assert "damaged" in self.load(saved)

    @pytest.mark.parametrize("version", [0, 3, "1", None])
    def test_other_versions(self, saved, version):
        rewrite(saved, lambda _, metadata: set_header(metadata, version=version))
        assert f"format version {version}, this kvzip reads versions 1 and 2" in self.load(saved)

    def test_foreign_safetensors(self, saved):
        for metadata in (None, {"format": "pt"}):
            save_file({"weight": torch.rand(3)}, saved, metadata)
            assert "no .kvz file" in self.load(saved)

    @pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 100, b"\xff" * 100, b"PK\x03\x04" * 9])
    def test_other_files(self, saved, data):
        saved.write_bytes(data)
        assert "is no .kvz file, or is truncated" in self.load(saved)

    def test_a_folder(self, tmp_path):
        assert "is a folder" in self.load(tmp_path)

    def test_no_file(self, tmp_path):
        assert "there is no file" in self.load(tmp_path / "none.kvz")
        assert "there is no file" in self.load(tmp_path / "none" / "none.kvz")


class TestOtherModels:
    def test_other_type(self, saved):
        with pytest.raises(
            KVzipError, match=r"was made with model LlamaForCausalLM .* not with Qwen2"
        ):
            shared_model("qwen2").load(saved)

    def test_other_weights(self, saved):
        with pytest.raises(KVzipError, match="load it with that model"):
            make_model(seed=1).load(saved)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"num_key_value_heads": 4, "num_attention_heads": 4},
        ],
        ids=["rope", "heads"],
    )
    def test_other_config(self, saved, changes):
        with pytest.raises(KVzipError, match="load it with that model"):
            make_model(**changes).load(saved)

    @pytest.mark.parametrize(
        "changes",
        [
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 8},
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_attention_with_the_same_weights(self, changes, tmp_path):
        path = shared_model("gemma3").read(TEXT).save(tmp_path / "context.kvz")
        with pytest.raises(KVzipError, match="load it with that model"):
            make_model("gemma3", **changes).load(path)

    def test_other_chat_template(self, saved):
        with pytest.raises(KVzipError, match="another tokenizer or chat template"):
            shared_model(chat_template=None).load(saved)

    def test_the_same_model_made_again(self, saved):
        assert make_model().load(saved).document.context_length == 20


class TestWriting:
    @pytest.fixture
    def kv(self):
        return shared_model().read(TEXT)

    def test_an_existing_file_is_kept(self, kv, tmp_path):
        path = tmp_path / "context.kvz"
        path.write_text("precious")
        with pytest.raises(KVzipError, match="exists"):
            kv.save(path)
        assert path.read_text() == "precious"
        assert kv.save(path, overwrite=True) == path
        assert shared_model().load(path).seen_tokens == kv.seen_tokens

    def test_a_folder(self, kv, tmp_path):
        with pytest.raises(KVzipError, match="is a folder"):
            kv.save(tmp_path, overwrite=True)

    def test_a_missing_folder(self, kv, tmp_path):
        with pytest.raises(KVzipError, match="does not exist"):
            kv.save(tmp_path / "none" / "context.kvz")

    @contextmanager
    def full_disk(self, size: int):
        """Let no file grow beyond a size; the system refuses as it does on a full disk."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    @pytest.mark.parametrize("size", [0, 10_000])
    def test_a_full_disk_leaves_no_part_of_a_file(self, kv, tmp_path, size):
        path = tmp_path / "context.kvz"
        assert kv.nbytes > 10_000
        with self.full_disk(size), pytest.raises(KVzipError, match="cannot write"):
            kv.save(path)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_keeps_the_former_file(self, kv, tmp_path):
        path = kv.save(tmp_path / "context.kvz")
        before = path.read_bytes()
        with self.full_disk(10_000), pytest.raises(KVzipError, match="cannot write"):
            kv.save(path, overwrite=True)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_an_interrupted_write_leaves_nothing(self, kv, tmp_path, monkeypatch, error):
        def interrupted(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise error

        monkeypatch.setattr(storage, "save_file", interrupted)
        with pytest.raises((KVzipError, KeyboardInterrupt)) as caught:
            kv.save(tmp_path / "context.kvz")
        assert isinstance(caught.value, KVzipError) == isinstance(error, OSError)
        assert list(tmp_path.iterdir()) == []


def test_a_cache_without_a_context_is_refused(tmp_path):
    with pytest.raises(KVzipError, match="no context yet"):
        shared_model().begin().save(tmp_path / "empty.kvz")
    assert not list(tmp_path.iterdir())
