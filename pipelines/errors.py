"""The one exception, among the wrappers that Ray and Python put around it, that tells the user what is wrong."""

ROOMS = ("mova_core", "actors", "pipelines", "cluster")


def root_cause(error: BaseException) -> BaseException:
    """The outermost exception that this project raised itself, else the innermost one there is."""
    while not is_ours(error):
        failures = getattr(error, "worker_failures", None)  # Ray Train keeps its workers' errors by rank
        inner = next(iter(failures.values()), None) if failures else getattr(error, "cause", None) or error.__cause__
        if inner is None:
            return error
        error = inner
    return error


def is_ours(error: BaseException) -> bool:
    """Was it raised by this project's own code, so that its message was written for the user?"""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return type(error).__module__.split(".")[0] in ROOMS or raised_in.split(".")[0] in ROOMS
