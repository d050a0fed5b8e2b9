"""Samples as a model takes them: many a run, or one where its own constants allow no more.

A signature with a free batch axis promises batches of any size. Some exporters free it afterwards
and leave a Reshape to ``[1, -1]``, or a state of one sample, inside: only a run tells.
"""

from __future__ import annotations

from onnx_ecp.data.calibration import Calibration
from onnx_ecp.errors import CalibrationError, ProviderError
from onnx_ecp.graph import Model
from onnx_ecp.runtime.limits import check_deadline
from onnx_ecp.runtime.session import Session


def as_taken(
    model: Model, samples: Calibration, *, provider: str = "cpu", threads: int | None = None
) -> Calibration:
    """The samples, taken one at a time where two in one run fail and one alone does not.

    Where one alone fails too they stay as they are: the first run that needs them says why.

    Args:
        model: with the inputs that the samples fit.
        samples: two of them are tried.
        provider: of the session.
        threads: of the session.

    Raises:
        ProviderError: the time limit is over.

    >>> import numpy as np, onnx.parser
    >>> from onnx_ecp.data.calibration import load
    >>> from onnx_ecp.graph import load as load_model, signature
    >>> model = load_model(onnx.parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["" : 17]>
    ...     g (float[N, 2] x) => (float[1, 2] y) <int64[2] s = {1, 2}> { y = Reshape(x, s) }'''))
    >>> samples = load({"x": np.ones((4, 2), np.float32)}, signature(model.proto))
    >>> samples.stacked, as_taken(model, samples).stacked
    (True, False)
    """
    if not samples.stacked or samples.freed or len(samples) < 2:
        return samples
    alone = samples.alone
    try:
        session = Session(model.proto, provider=provider, threads=threads, base=model.base)
        if not _runs(session, samples) and _runs(session, alone):
            return alone
    except ProviderError:  # the session; the first one that is needed says so
        check_deadline()
    return samples


def _runs(session: Session, samples: Calibration) -> bool:
    try:
        session.run(next(samples.batches(2)).feeds)
    except (CalibrationError, ProviderError):
        check_deadline()
        return False
    return True
