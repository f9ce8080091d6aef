"""What the coordinator remembers, in SQLite or PostgreSQL through SQLAlchemy."""
