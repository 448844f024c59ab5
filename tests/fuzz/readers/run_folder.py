"""A run folder, as tools and a resume read it: config.yaml, run.json, weights, optimiser."""

import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from pipeline.errors import UserError
from tests.fuzz.damage import Random, damage
from tests.fuzz.structure import alter
from tools.report.results import read_config
from train.config import SETTINGS, DataConfig, RunConfig
from train.run import checkpoint
from train.run.checkpoint import Record, Retention
from train.run.provenance import provenance
from train.run.settings import to_dict, to_yaml

FILES = ("run.json", "model.safetensors", "optimizer.bin")


class Target:
    """A run of one step, of a small network."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()
        config = RunConfig("x", DataConfig("x"))
        record = Record(
            step=7,
            config=to_dict(config),
            data={"images": 3, "fingerprint": "0123abcd"},
            seconds=1.25,
            meter=[[0.1, 2.0, 3e-9], [1.0, 2.0, 3.0]],
            provenance=provenance(),
        )
        state = {
            "model.safetensors": self.model.state_dict(),
            "optimizer.bin": self.optimizer.state_dict(),
            "scaler.pt": None,
        }
        self.run.mkdir()
        checkpoint.write(self.run, record, state, Retention(1, 0, 10))
        self.config = self.run / "config.yaml"
        self.yaml = to_yaml(config).encode()
        self.folder = self.run / "checkpoints" / "step_7"
        self.content = {name: (self.folder / name).read_bytes() for name in FILES}
        self.truth = self._read()

    def try_one(self, random: Random) -> str:
        kind = int(random.integers(10))
        try:
            if kind == 0:
                return self._try_config(damage(self.yaml, random))
            if kind < 6:
                self._damage_a_file(FILES[random.integers(3)] if kind > 2 else "run.json", random)
                return self._outcome(changed=False)
            if kind < 8:
                content, _ = alter(json.loads(self.content["run.json"]), random)
                (self.folder / "run.json").write_text(json.dumps(content))
                return self._outcome(changed=False)
            return self._try_corrected(random)
        finally:
            for name, content in self.content.items():
                (self.folder / name).write_bytes(content)

    def _damage_a_file(self, name: str, random: Random) -> None:
        path = self.folder / name
        if random.integers(20) == 0:
            path.unlink()
        else:
            path.write_bytes(damage(self.content[name], random))

    def _try_corrected(self, random: Random) -> str:
        """Damage by one who also corrects the checksums: any content, but no crash."""
        record = json.loads(self.content["run.json"])
        if random.integers(2):
            record, _ = alter(record, random)
        else:
            self._damage_a_file(FILES[random.integers(1, 3)], random)
        try:
            (self.folder / "run.json").unlink()
            checkpoint.write_record(self.folder, Record(**record))
        except (TypeError, ValueError, msgspec.ValidationError):  # no record can hold this
            (self.folder / "run.json").write_bytes(json.dumps(record).encode())
        return self._outcome(changed=True)

    def _try_config(self, content: bytes) -> str:
        self.config.write_bytes(content)
        try:
            read_config(self.config)
        except UserError as error:
            return self._refused(error, str(self.config))
        return "config read"

    def _outcome(self, changed: bool) -> str:
        try:
            found = self._read()
        except UserError as error:
            return self._refused(error, str(self.run))
        if changed:
            return "read as corrected"
        assert found == self.truth, "other content was believed"
        return "read"

    def _read(self) -> Any:
        folder = checkpoint.find(self.run)
        record = checkpoint.read_record(folder, SETTINGS)
        checkpoint.restore(folder, record, self.model, self.optimizer, None)
        weights = {name: value.tolist() for name, value in self.model.state_dict().items()}
        momenta = [str(state) for state in self.optimizer.state.values()]
        return record, weights, momenta

    @staticmethod
    def _refused(error: UserError, names: str) -> str:
        said = str(error)
        assert said.isprintable() and names in said and len(said) < 1000, repr(said[:300])
        return "refused"
