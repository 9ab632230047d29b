"""`kvzip head-scores` as a user runs it: calibration, files of others, and what is refused."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvzip import KVzipError, ModelKVzip
from kvzip.cli import main
from kvzip.evaluation.asking import token_counter
from kvzip.evaluation.tasks import TASKS, get_task
from kvzip.scoring import heads
from models import make_hf_model, make_tokenizer

SHAPE = (8, 4)  # of the bundled model


@pytest.fixture
def kvzip(capsys):
    """Run the program: `status, stdout, stderr`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def made(kvzip):
    """Run the program and return what it says of what it made."""

    def run(*arguments: object) -> dict:
        status, out, err = kvzip("head-scores", *arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(kvzip, tmp_path, monkeypatch):
    """Run the program on bad input, without a model, and return the one line that it says."""

    def load(self, *args, **kwargs):
        raise AssertionError("a model was loaded")

    def run(*arguments: object, model: bool = False) -> str:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            if not model:
                patch.setattr("kvzip.model.ModelKVzip.__init__", load)
            status, out, err = kvzip("head-scores", *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("kvzip: ")
        assert err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture(scope="module")
def bundled() -> ModelKVzip:
    return ModelKVzip(device="cpu")


def save_tensor(path: Path, *shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    torch.save(tensor, path)
    return tensor


def save_pattern(folder: Path, rows: list[list[float]], config: dict | str) -> Path:
    folder.mkdir()
    lines = ["\t".join(f"{score:.18e}" for score in row) for row in rows]
    (folder / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, "utf-8")
    return folder


SIZES = {"model_name": "some/model", "sink_size": 64, "recent_size": 200}


class TestCalibration:
    TASKS = ("-d", "synthetic_profiles,synthetic_key_values", "--num", "2", "--lengths", "300")

    def test_scores_are_the_largest_of_all_samples(self, made, bundled, tmp_path):
        path = tmp_path / "heads.safetensors"
        report = made(*self.TASKS, "--seed", "3", "--device", "cpu", "-o", path)
        largest, names, tokens = torch.zeros(SHAPE), [], 0
        for task in ("synthetic_profiles", "synthetic_key_values"):
            count = token_counter(bundled)
            for sample in get_task(task).samples(2, seed=3, count_tokens=count, lengths=(300,)):
                scores = bundled.prefill(sample.context).scores.values
                largest = torch.maximum(largest, scores.amax(-1))
                names.append(f"{task}/{sample.id}")
                tokens += scores.shape[-1]
        got = heads.read(path)
        torch.testing.assert_close(got.values, largest, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.tensor(report["scores"]), largest, atol=1e-6, rtol=0)
        assert report["samples"] == got.about["samples"] == names
        assert report["context_tokens"] == tokens
        assert (report["layers"], report["kv_heads"]) == SHAPE
        assert got.about["fingerprint"] == bundled.origin.fingerprint == report["fingerprint"]
        assert got.about["model_id"] == "bundled" == report["model"]
        assert set(got.about["versions"]) == {"kvzip", "torch", "transformers"}
        assert str(tmp_path) not in json.dumps(got.about)

    def test_a_table_without_json(self, kvzip, tmp_path):
        path = tmp_path / "heads.safetensors"
        status, out, _ = kvzip("head-scores", *self.TASKS, "--device", "cpu", "-o", path)
        assert status == 0
        for part in ("4 samples, ", "8 layers x 4 KV heads", "median 0.", str(path)):
            assert part in out

    def test_samples_without_room_are_skipped(self, made, refused, tmp_path):
        path = tmp_path / "heads.safetensors"
        how = ("-d", "synthetic_profiles", "--num", "2", "--device", "cpu", "-o", path)
        report = made(*how, "--lengths", "300,9000")
        assert len(report["samples"]) == len(report["skipped"]) == 1
        assert "the model has 8192" in next(iter(report["skipped"].values()))
        path.unlink()
        line = refused(*how, "--lengths", "9000", model=True)
        assert "there is nothing to calibrate with: the context takes" in line

    def test_export_beside_the_file(self, made, tmp_path):
        path, folder = tmp_path / "heads.safetensors", tmp_path / "pattern"
        made("-d", "synthetic_profiles", "--lengths", "200", "-o", path, "--export", folder)
        assert torch.equal(read_pattern(folder), heads.read(path).values)

    def test_prefill_takes_the_file(self, made, bundled, tmp_path):
        path = tmp_path / "heads.safetensors"
        made("-d", "synthetic_profiles", "--lengths", "200", "-o", path)
        kv = bundled.prefill("My name is Kim.", load_score=path)
        assert torch.equal(kv.scores.values[..., 0], heads.read(path).values)


class TestBundled:
    """What ships with the bundled model."""

    def test_head_scores_belong_to_it(self, bundled):
        path = Path(bundled.hf_model.name_or_path) / heads.FILE_NAME
        shipped = heads.read(path)
        assert shipped.values.shape == SHAPE
        assert shipped.about["fingerprint"] == bundled.origin.fingerprint
        assert shipped.about["model_id"] == "bundled"
        tasks = [name for name in TASKS if name.startswith("synthetic_")]
        assert shipped.about["tasks"] == tasks
        assert {name.split("/")[0] for name in shipped.about["samples"]} == set(tasks)

    def test_they_are_a_scorer_like_any_other(self, bundled):
        """As `kvzip eval --scorer heads` asks for them."""
        by_name = bundled.prefill("My name is Kim.", scorer="heads").scores
        assert by_name.scorer == "heads"
        assert torch.equal(
            by_name.values, bundled.prefill("My name is Kim.", load_score=True).scores.values
        )

    def test_dropped_heads_hold_nothing_and_answers_stay(self, bundled, tmp_path):
        sample = next(
            get_task("synthetic_profiles").samples(
                1, count_tokens=token_counter(bundled), lengths=(600,)
            )
        )
        full = bundled.prefill(sample.context, load_score=True)
        n, p = full.document.context_length, full.document.prefix_length
        before = full.nbytes
        queries = [question.text for question in sample.questions][:6]
        expected = bundled.ask(full, queries)
        kv = full.prune(0.5, "head")
        lengths = torch.stack([layer.context.indptr.diff() for layer in kv.layers])
        shipped = heads.read(Path(bundled.hf_model.name_or_path) / heads.FILE_NAME).values
        best = shipped.flatten().argsort(descending=True, stable=True)[:16]
        kept = torch.zeros(32, dtype=torch.bool).index_fill(0, best, True).view(SHAPE)
        assert torch.equal(lengths, torch.where(kept, p + n, p))
        bytes_of_context = before * n / (n + p)
        assert kv.nbytes == pytest.approx(before - bytes_of_context / 2, rel=0.01)
        assert bundled.ask(kv, queries) == expected
        loaded = bundled.load(kv.save(tmp_path / "heads.kvz"))
        assert loaded.scores.scorer == "heads"
        assert torch.equal(loaded.kept, kv.kept)
        assert bundled.ask(loaded, queries) == expected


def read_pattern(folder: Path) -> torch.Tensor:
    lines = (folder / "full_attention_heads.tsv").read_text("utf-8").splitlines()
    return torch.tensor([[float(score) for score in line.split("\t")] for line in lines])


class TestImport:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(28, 4), (28, 1, 4), (1, 28, 4, 1), (28, 1), (28, 1, 1)])
    def test_tensors(self, made, tmp_path, shape, dtype):
        tensor = save_tensor(tmp_path / "one.pt", *shape, dtype=dtype)
        report = made("--import", tmp_path / "one.pt", "-o", tmp_path / "heads.safetensors")
        got = heads.read(tmp_path / "heads.safetensors")
        assert torch.equal(got.values, tensor.float().reshape(28, -1))
        assert got.about == {"imported": ["one.pt"]}
        assert report["imported"] == ["one.pt"]
        assert report["model"] is None

    def test_the_largest_of_several(self, made, tmp_path):
        parts = [save_tensor(tmp_path / f"{i}.pt", 3, 1, 2, seed=i) for i in range(3)]
        parts = [part.view(3, 2) for part in parts]
        rows = [[0.0, 1.0], [0.99, 0.0], [0.0, 0.5]]
        pattern = save_pattern(tmp_path / "pattern", rows, SIZES)
        names = [tmp_path / f"{i}.pt" for i in range(3)]
        made("--import", *names, pattern, "-o", tmp_path / "heads.safetensors")
        got = heads.read(tmp_path / "heads.safetensors")
        assert torch.equal(got.values, torch.stack([*parts, torch.tensor(rows)]).amax(0))
        assert got.about["imported"] == ["0.pt", "1.pt", "2.pt", "pattern"]
        repeated = [word for name in [*names, pattern] for word in ("--import", name)]
        made(*repeated, "-o", tmp_path / "again.safetensors")
        again = (tmp_path / "again.safetensors").read_bytes()
        assert again == (tmp_path / "heads.safetensors").read_bytes()

    def test_a_tensor_saved_on_a_gpu(self, made, tmp_path, monkeypatch):
        storage_type = torch.serialization.location_tag
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        tensor = save_tensor(tmp_path / "gpu.pt", 3, 2)
        monkeypatch.setattr(torch.serialization, "location_tag", storage_type)
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.pt", weights_only=True)
        report = made("--import", tmp_path / "gpu.pt", "-o", tmp_path / "heads.safetensors")
        assert torch.equal(torch.tensor(report["scores"]), tensor)

    def test_patterns_go_there_and_back(self, made, tmp_path):
        rows = torch.rand(5, 3, dtype=torch.float64).half().tolist()
        pattern = save_pattern(tmp_path / "pattern", rows, SIZES)
        made("--import", pattern, "-o", tmp_path / "a.safetensors", "--export", tmp_path / "back")
        original, back = (
            (folder / "full_attention_heads.tsv").read_bytes()
            for folder in (pattern, tmp_path / "back")
        )
        assert original == back
        config = json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))
        assert (config["sink_size"], config["recent_size"]) == (64, 200)
        table = tmp_path / "back" / "full_attention_heads.tsv"
        made("--import", table, "-o", tmp_path / "b.safetensors")
        first, second = (heads.read(tmp_path / f"{name}.safetensors") for name in "ab")
        assert torch.equal(first.values, second.values)
        assert second.about["sink_size"] == 64

    @pytest.mark.parametrize(
        ("given", "expected"),
        [((), (128, 256)), (("--sink-size", 4), (4, 256)), (("--recent-size", 0), (128, 0))],
    )
    def test_sizes_of_an_export(self, made, tmp_path, given, expected):
        save_tensor(tmp_path / "one.pt", 3, 2)
        made("--import", tmp_path / "one.pt", "--export", tmp_path / "pattern", *given)
        config = json.loads((tmp_path / "pattern" / "config.json").read_text("utf-8"))
        assert (config["sink_size"], config["recent_size"]) == expected

    def test_scores_of_another_model_are_taken_over(self, made, refused, bundled, tmp_path):
        path = tmp_path / "other.safetensors"
        about = {"model_id": "another", "fingerprint": "0" * 32}
        heads.save(torch.rand(SHAPE), path, about)
        with pytest.raises(KVzipError, match=r"made with model another \(fingerprint 000"):
            bundled.prefill("some text", load_score=path)
        taken = tmp_path / "taken.safetensors"
        report = made("--import", path, "-m", "bundled", "--device", "cpu", "-o", taken)
        assert report["fingerprint"] == bundled.origin.fingerprint
        assert heads.read(taken).about["model_id"] == "bundled"
        assert bundled.prefill("some text", load_score=taken).scores.scorer == "heads"

    def test_a_model_of_another_shape(self, refused, tmp_path):
        save_tensor(tmp_path / "one.pt", 32, 8)
        line = refused(
            "--import", tmp_path / "one.pt", "-m", "bundled", "-o", tmp_path / "x", model=True
        )
        assert "one.pt holds scores for [32, 8] layers x KV heads, this model has [8, 4]" in line

    def test_layers_with_full_attention_count(self, made, tmp_path):
        model, folder = make_hf_model("gemma3"), tmp_path / "gemma"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        save_tensor(tmp_path / "one.pt", 1, 2)
        made("--import", tmp_path / "one.pt", "-m", folder, "-o", tmp_path / "heads.safetensors")


class Payload:
    """What a pickle must not do."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def zip_file(path: Path, thing: object) -> None:
    torch.save(thing, path)


def plain_pickle(path: Path, thing: object) -> None:
    path.write_bytes(pickle.dumps(thing))


class TestRefused:
    @pytest.mark.parametrize(
        ("thing", "why"),
        [
            ({"scores": torch.rand(3, 2)}, "holds a dict, not one tensor"),
            ([torch.rand(3, 2)], "holds a list, not one tensor"),
            (OrderedDict(a=torch.rand(3, 2)), "holds a OrderedDict, not one tensor"),
            (torch.rand(3), r"float32 with shape [3]"),
            (torch.rand(3, 2, 4), "float32 with shape [3, 2, 4]"),
            (torch.rand(0, 2), "float32 with shape [0, 2]"),
            (torch.rand(1, 0, 2), "float32 with shape [1, 0, 2]"),
            (torch.ones(3, 2, dtype=torch.int64), "torch.int64 with shape [3, 2]"),
            (torch.rand(3, 2).to_sparse(), "holds a Tensor, not one tensor"),
            (torch.tensor([[0.5, torch.nan]]), "holds scores that are not finite"),
            (torch.tensor([[0.5, torch.inf]]), "holds scores that are not finite"),
        ],
        ids=lambda part: part if isinstance(part, str) else type(part).__name__,
    )
    def test_a_pickle_of_something_else(self, refused, tmp_path, thing, why):
        zip_file(tmp_path / "one.pt", thing)
        assert why in refused("--import", tmp_path / "one.pt", "-o", tmp_path / "x.safetensors")

    @pytest.mark.parametrize("save", [zip_file, plain_pickle])
    @pytest.mark.parametrize(
        "thing",
        [Payload(), {"a": torch.rand(2, 2), "b": Payload()}],
        ids=["alone", "beside-a-tensor"],
    )
    def test_a_pickle_that_runs_code(self, refused, tmp_path, monkeypatch, save, thing):
        monkeypatch.chdir(tmp_path)
        save(tmp_path / "one.pt", thing)
        line = refused("--import", tmp_path / "one.pt", "-o", tmp_path / "x.safetensors")
        assert "holds more than tensors, or is damaged, and is not opened" in line
        assert not (tmp_path / "opened").exists()

    @pytest.mark.parametrize("end", [0, 1, 100, -100, -1])
    def test_a_damaged_pickle(self, refused, tmp_path, end):
        save_tensor(tmp_path / "one.pt", 3, 2)
        data = (tmp_path / "one.pt").read_bytes()
        (tmp_path / "one.pt").write_bytes(data[:end])
        line = refused("--import", tmp_path / "one.pt", "-o", tmp_path / "x.safetensors")
        assert "damaged" in line

    def test_text_is_no_pickle(self, refused, tmp_path):
        (tmp_path / "one.pt").write_text("0.5\t0.5\n", "utf-8")
        line = refused("--import", tmp_path / "one.pt", "-o", tmp_path / "x.safetensors")
        assert "damaged" in line

    def test_shapes_that_differ(self, refused, tmp_path):
        save_tensor(tmp_path / "one.pt", 3, 2)
        save_tensor(tmp_path / "two.pt", 3, 4)
        files = tmp_path / "one.pt", tmp_path / "two.pt"
        line = refused("--import", *files, "-o", tmp_path / "x.safetensors")
        assert "two.pt holds scores for [3, 4] layers x KV heads" in line
        assert "one.pt for [3, 2]: they belong to different models" in line

    @pytest.mark.parametrize(
        ("rows", "config", "why"),
        [
            ([[0.1, 0.2], [0.3]], SIZES, "line 2: there are 1 columns, and 2 in line 1"),
            ([[0.1], [0.2, 0.3]], SIZES, "line 2: there are 2 columns, and 1 in line 1"),
            ([[0.1, float("nan")]], SIZES, "holds scores that are not finite"),
            ([[0.1]], {"sink_size": 4}, "config.json: recent_size is None"),
            ([[0.1]], {**SIZES, "sink_size": -1}, "config.json: sink_size is -1"),
            ([[0.1]], {**SIZES, "sink_size": "many"}, "config.json: sink_size is 'many'"),
            ([[0.1]], "{", "config.json is not JSON"),
            ([[0.1]], "[1]", "config.json holds no JSON object"),
        ],
    )
    def test_a_bad_pattern(self, refused, tmp_path, rows, config, why):
        pattern = save_pattern(tmp_path / "pattern", rows, config)
        assert why in refused("--import", pattern, "-o", tmp_path / "x.safetensors")

    @pytest.mark.parametrize("text", ["", "\n", "a\tb\n", "0.1\t\n", "0.1 0.2\n", "\ud800"])
    def test_a_pattern_that_is_no_table(self, refused, tmp_path, text):
        pattern = save_pattern(tmp_path / "pattern", [[0.1]], SIZES)
        table = pattern / "full_attention_heads.tsv"
        table.write_bytes(text.encode("utf-8", "surrogatepass"))
        line = refused("--import", pattern, "-o", tmp_path / "x.safetensors")
        assert "full_attention_heads.tsv, line 1" in line or "not UTF-8" in line

    @pytest.mark.parametrize("missing", ["full_attention_heads.tsv", "config.json"])
    def test_a_pattern_without_a_file(self, refused, tmp_path, missing):
        pattern = save_pattern(tmp_path / "pattern", [[0.1]], SIZES)
        (pattern / missing).unlink()
        line = refused("--import", pattern, "-o", tmp_path / "x.safetensors")
        assert f"is no pattern of DuoAttention: it has no {missing}" in line

    def test_files_that_are_not_there_or_unknown(self, refused, tmp_path):
        line = refused("--import", tmp_path / "no.pt", "-o", tmp_path / "x.safetensors")
        assert f"there is no file {tmp_path / 'no.pt'}" in line
        (tmp_path / "scores.csv").write_text("0.1", "utf-8")
        line = refused("--import", tmp_path / "scores.csv", "-o", tmp_path / "x.safetensors")
        assert "scores.csv is of no known form: give a tensor (.pt)" in line

    @pytest.mark.parametrize(
        ("tensors", "metadata", "why"),
        [
            ({"other": torch.rand(3, 2)}, {}, "is no head score file"),
            ({"head_scores": torch.rand(3)}, {}, "with shape [3]"),
            ({"head_scores": torch.rand(3, 2)}, {"kvzip": "{"}, "is no head score file"),
            ({"head_scores": torch.rand(3, 2)}, {"kvzip": "[]"}, "metadata are no JSON object"),
        ],
    )
    def test_a_bad_file_of_our_own(self, refused, tmp_path, tensors, metadata, why):
        save_file(tensors, tmp_path / "bad.safetensors", metadata)
        line = refused("--import", tmp_path / "bad.safetensors", "-o", tmp_path / "x.safetensors")
        assert why in line

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (("-o", "x"), "say what to make head scores from"),
            (("-d", "squad"), "say where the scores go"),
            (("-d", "squadd", "-o", "x"), "unknown task 'squadd': did you mean 'squad'"),
            (("-d", "nothing_*", "-o", "x"), "no task is called 'nothing_*'"),
            (("-d", ",", "-o", "x"), "there is no task to run"),
            (("-d", "squad", "--import", "a.pt", "-o", "x"), "--data is for calibration"),
            (("--num", "2", "--import", "a.pt", "-o", "x"), "--num is for calibration"),
            (("--lengths", "9", "--import", "a.pt", "-o", "x"), "--lengths is for calibration"),
            (("a.pt", "-o", "x"), "a.pt: files are read with --import"),
            (("-d", "squad", "a.pt", "-o", "x"), "a.pt: files are read with --import"),
            (("-d", "squad", "--lengths", "many", "-o", "x"), "--lengths"),
            (("-d", "squad", "--num", "0", "-o", "x"), "--num"),
            (("-d", "squad", "-o", "x", "--sink-size", "4"), "are for --export"),
            (("-d", "squad", "-o", "missing/x"), "the folder missing does not exist"),
            (("-d", "squad", "--export", "missing/x"), "the folder missing does not exist"),
            (("-d", "squad", "--data-dir", "missing", "-o", "x"), "missing does not exist"),
            (("-d", "synthetic_sums", "-m", "nobody", "-o", "x"), "unknown model 'nobody'"),
        ],
    )
    def test_options(self, refused, tmp_path, monkeypatch, arguments, why):
        monkeypatch.chdir(tmp_path)
        assert why in refused(*arguments)

    def test_what_is_there_is_left_alone(self, made, refused, tmp_path):
        save_tensor(tmp_path / "one.pt", 3, 2)
        save_tensor(tmp_path / "two.pt", 3, 2, seed=1)
        path, folder = tmp_path / "heads.safetensors", tmp_path / "pattern"
        made("--import", tmp_path / "one.pt", "-o", path, "--export", folder)
        data = path.read_bytes(), (folder / "full_attention_heads.tsv").read_bytes()
        assert "exists" in refused("--import", tmp_path / "two.pt", "-o", path)
        assert "exists" in refused("--import", tmp_path / "two.pt", "--export", folder)
        assert data == (path.read_bytes(), (folder / "full_attention_heads.tsv").read_bytes())
        made("--import", tmp_path / "two.pt", "-o", path, "--export", folder, "--force")
        assert data[0] != path.read_bytes()
        assert data[1] != (folder / "full_attention_heads.tsv").read_bytes()
        (tmp_path / "file").write_text("", "utf-8")
        line = refused("--import", tmp_path / "two.pt", "--export", tmp_path / "file")
        assert "file is no folder" in line

    def test_a_failed_export_leaves_nothing(self, refused, tmp_path, monkeypatch):
        save_tensor(tmp_path / "one.pt", 3, 2)
        folder = tmp_path / "pattern"
        folder.mkdir()

        def fail(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", fail)
        line = refused("--import", tmp_path / "one.pt", "--export", folder)
        assert "cannot write to" in line
        assert "No space left on device" in line


def test_the_file_is_plain_safetensors(made, tmp_path):
    tensor = save_tensor(tmp_path / "one.pt", 3, 2)
    made("--import", tmp_path / "one.pt", "-o", tmp_path / "heads.safetensors")
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["head_scores"]
        assert torch.equal(file.get_tensor("head_scores"), tensor)


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from kvzip.cli import main; status = main(['head-scores', '--help']); "
        "sys.exit(status or sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "kvzip head-scores --import" in shown.stdout
