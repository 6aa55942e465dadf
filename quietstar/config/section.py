"""What all sections of the config share."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """What all parts of the tree share: frozen, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
