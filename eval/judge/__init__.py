"""Pictures compared pair by pair by a model that sees and reads."""
