"""The contract of every family, held by this one."""

import numpy as np

from ssh_deploy.testing import FamilyContract


class TestOuter(FamilyContract):
    family = "outer"

    def example(self, rng):
        u, v = rng.normal(size=6).astype(np.float32), rng.normal(size=9).astype(np.float32)
        tensors = {"base_model.model.a.b.outer_u": u, "base_model.model.a.b.outer_v": v}
        return {"peft_type": "OUTER", "scaling": 0.5}, tensors, {}, {"a.b": 0.5 * np.outer(u, v).astype(np.float64)}
