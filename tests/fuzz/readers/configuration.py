"""YAML files as the configurations of pre-training and of both transfers."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from tests import ROOT
from tests.fuzz.damage import Random, damage
from tests.fuzz.structure import alter
from train.config import SETTINGS
from train.run.settings import Settings, to_dict, to_yaml
from transfer.command import settings_of
from transfer.detection.config import DetectionConfig
from transfer.segmentation.config import SegmentationConfig

_ALL: tuple[tuple[Settings[Any], tuple[str, ...]], ...] = (
    (SETTINGS, ("scenes_cpu", "coco_r50_800ep")),
    (settings_of(DetectionConfig), ("transfer/coco_1x", "transfer/coco_overfit_cpu")),
    (settings_of(SegmentationConfig), ("transfer/voc", "transfer/ade20k", "transfer/camvid_cpu")),
)
_PIECES = (
    "&a [x, x]\n", "*a", "<<: *a\n", "!!python/name:os.system ", "--- \n", "? ", "- ",
    "%YAML 1.1\n", "{", "[", "'", '"', "|\n", "\t", "name: x\n", "\ufeff", "\\ud800", "12:30",
)  # fmt: skip


class Target:
    """Recipes of the repository and configurations with all keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.yaml"
        self.texts: list[tuple[Settings[Any], str, Any]] = []
        for settings, names in _ALL:
            for name in names:
                text = (ROOT / "configs" / f"{name}.yaml").read_text()
                values = yaml.safe_load(text)
                inside = values.get("data") or {}
                known = {k: "x" for k in ("path", "root") if f"data.{k}" in settings._fields}
                config = settings.from_dict({**values, "data": {**known, **inside}})
                self.texts.append((settings, text, values))
                self.texts.append((settings, to_yaml(config), to_dict(config)))

    def try_one(self, random: Random) -> str:
        settings, text, whole = self.texts[random.integers(len(self.texts))]
        kind = int(random.integers(4))
        if kind == 0:
            self.path.write_bytes(damage(text.encode(), random))
        elif kind == 1:
            content = text
            for _ in range(int(random.integers(1, 4))):
                at = int(random.integers(len(content)))
                content = content[:at] + _PIECES[random.integers(len(_PIECES))] + content[at:]
            self.path.write_text(content)
        else:
            values, _ = alter(whole, random)
            if kind == 3:
                return self._outcome_of(settings, values)
            self.path.write_text(yaml.safe_dump(values, sort_keys=bool(random.integers(2))))
        try:
            config, _ = settings.load(["--config", str(self.path)])
        except UserError as error:
            return self._refused(error, str(self.path))
        return self._same(settings, config)

    def _outcome_of(self, settings: Settings[Any], values: Any) -> str:
        """As run.json holds them."""
        try:
            config = settings.from_dict(values)
        except UserError as error:
            return self._refused(error, "")
        return self._same(settings, config)

    @staticmethod
    def _refused(error: UserError, names: str) -> str:
        said = str(error)
        assert said.isprintable() and names in said and len(said) < 2000, repr(said[:300])
        return "missing" if "missing: " in said else "refused"

    def _same(self, settings: Settings[Any], config: Any) -> str:
        """What was accepted must be what a checkpoint and config.yaml give back."""
        assert settings.from_dict(json.loads(json.dumps(to_dict(config)))) == config
        self.path.write_text(to_yaml(config))
        assert settings.load(["--config", str(self.path)])[0] == config
        return "read"
