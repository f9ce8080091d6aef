"""What all tables share."""

from sqlalchemy import BigInteger, Integer
from sqlalchemy.orm import DeclarativeBase

BIG = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only for INTEGER


class Base(DeclarativeBase):
    pass
