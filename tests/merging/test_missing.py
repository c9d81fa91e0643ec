"""L6 over the registry: a module that a LoRA does not have is an update of zero.

What is expected comes from formulas on dense matrices with explicit zeros, as a file with zeros in
it takes the same way through the program as one without the module.
"""

import zlib

import numpy as np
import pytest
import torch

from cmlora.adapters.merging import MERGES, merge
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.moments import seen, unseen
from cmlora.adapters.merging.ziplora import ziplora
from cmlora.errors import CmloraError
from cmlora.lora import Update
from tests.merging import references
from tests.merging.makers import distance, do, grams, inputs, make, without, zeroed

MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LORAS = [make("a", 3), without(make("b", 3), MODULE)]
WEIGHTS = [0.8, 0.6]


def least_squares(own: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    """The D that is nearest to one LoRA's update on its inputs and to nothing on the other's."""
    wanted = np.concatenate([seen[0] @ own.T, np.zeros((len(seen[1]), len(own)))])
    return np.asarray(np.linalg.lstsq(np.concatenate(seen), wanted, rcond=None)[0].T)


def best_columns(own: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    """The same among D_a diag(m), one unknown per column."""
    rows = np.concatenate([np.einsum("nm,om->nom", x, own).reshape(-1, len(own.T)) for x in seen])
    target = np.concatenate([(seen[0] @ own.T).ravel(), np.zeros(len(seen[1]) * len(own))])
    return np.asarray(own * np.linalg.lstsq(rows, target, rcond=None)[0])


def expected(method: str, update: Update, module: str) -> np.ndarray:
    """What becomes of a's update (O, M) of one module where b has none."""
    own = update.delta().flatten(1).numpy()
    if method in ("pleas", "ziplora"):
        seen = [inputs(name, module, own.shape[1]).numpy() for name in "ab"]
        best = least_squares if method == "pleas" else best_columns
        return best(WEIGHTS[0] * own.astype(float), seen)
    deltas, most = [own, np.zeros_like(own)], min(*own.shape, update.rank)
    if method in references.RANDOM:
        generator = torch.Generator().manual_seed(zlib.crc32(f"0/{module}".encode()))
        return references.cut(references.RANDOM[method](deltas, WEIGHTS, generator), most)
    if method in references.EXACT:
        return references.cut(references.EXACT[method](deltas, WEIGHTS), most)
    # Nothing of b meets anything of a: units of zero are no units, and factors of zero add nothing.
    assert method in ("svd", "factor_linear", "lego")
    return references.weighted_sum(deltas, WEIGHTS)


@pytest.mark.parametrize("method", list(MERGES))
def test_a_missing_module_is_zero(method: str) -> None:
    found = do(method, LORAS, WEIGHTS).lora.updates[MODULE].delta().double().numpy()
    wanted = expected(method, LORAS[0].updates[MODULE], MODULE)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", list(MERGES))
def test_zeros_in_a_file_are_a_missing_module(method: str) -> None:
    missing = do(method, LORAS, WEIGHTS)
    zero = do(method, [LORAS[0], zeroed(make("b", 3), MODULE)], WEIGHTS)
    assert distance(missing.lora, zero.lora) < 1e-6
    nowhere = do(method, [without(lora, MODULE) for lora in LORAS])
    assert MODULE not in nowhere.lora.updates


def test_a_survey_of_all_modules_passes_over_those_nobody_changes() -> None:
    none = [zeroed(lora, MODULE) for lora in (make("a", 3), make("b", 2))]
    fewer = [without(lora, MODULE) for lora in none]
    one, other = (
        merge(loras, WEIGHTS, "knots_ties", scope="all", density=0.2).lora
        for loras in (none, fewer)
    )
    assert MODULE not in one.updates
    assert distance(one, other) == 0


@pytest.mark.parametrize("method", ["pleas", "ziplora"])
def test_data_about_the_lora_that_does_nothing_are_asked_for(method: str) -> None:
    known = grams(LORAS)
    del known["b"][MODULE]
    with pytest.raises(CmloraError, match=f"there is none of b for {MODULE}"):
        merge(LORAS, WEIGHTS, method, grams=known)


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_a_small_update_is_nearly_none(method: str) -> None:
    """The length is continuous at zero; the direction cannot be."""
    small = make("b", 3)
    small.updates[MODULE].up.mul_(1e-6)
    none = do(method, LORAS, WEIGHTS).lora.updates[MODULE]
    little = do(method, [LORAS[0], small], WEIGHTS).lora.updates[MODULE]
    assert little.norm() == pytest.approx(none.norm(), rel=1e-5)
    assert none.norm() == pytest.approx(0.8 / 1.4 * make("a", 3).updates[MODULE].norm(), rel=1e-5)


def test_moments_in_blocks_take_no_rows() -> None:
    blocks = torch.eye(9).double().expand(4, 9, 9)
    nothing = torch.zeros(0, 36).double()
    assert seen(nothing, blocks).shape == unseen(nothing, blocks, 0.0).shape == (0, 36)
    g = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=g).double() for shape in ((5, 2), (2, 36)))
    empty = Pair(up[:, :0], down[:0])
    found = ziplora([Pair(up, down), empty], [1.0, 1.0], grams=[blocks, 3 * blocks])
    torch.testing.assert_close(found.up @ found.down, up @ down / 4)
