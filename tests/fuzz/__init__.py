"""Altered inputs by seed: no reader may crash, hang, grow or accept a wrong content in silence."""
