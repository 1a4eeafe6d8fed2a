//! Home of the integration tests; see `tests/`.
