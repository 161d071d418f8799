"""When questions arrive, by nobody's leave but the clock's."""

import numpy as np
import numpy.typing as npt

MAX_ARRIVALS = 100_000


def poisson(rate: float, seconds: float, seed: int) -> npt.NDArray[np.float64]:
    """Arrival times in seconds, ascending within [0, seconds), of a Poisson process of `rate` a second.

    Equal arguments give equal times, so that two servers can be asked at the same moments. Raises ValueError for a rate
    or a time that is not positive, or that promises more than MAX_ARRIVALS.
    """
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"rate {rate} and seconds {seconds} must be positive")
    if rate * seconds > MAX_ARRIVALS:
        raise ValueError(f"{rate} questions a second for {seconds} s are more than {MAX_ARRIVALS}")
    random = np.random.default_rng(seed)
    count = random.poisson(rate * seconds)
    return np.sort(random.uniform(0, seconds, count))
