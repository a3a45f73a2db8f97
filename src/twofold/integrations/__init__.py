"""twofold inside training frameworks: `lightning` and `transformers`, each imported only when asked for."""
