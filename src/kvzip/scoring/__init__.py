"""Stage 2: how important is each context pair? One file a scorer; all return `Scores`."""
