"""Small helpers for notebooks: show an expected error, try an exercise."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["attempt", "show_error"]


def show_error(function: Callable, *args, **kwargs) -> None:
    """Call `function`, which must raise, and print the error's type and message.

    A cell that shows a failure on purpose stays a test: if nothing is raised, this raises.
    """
    try:
        function(*args, **kwargs)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{function.__name__} raised nothing; an error was expected")


def attempt(test: Callable[[Callable], None], answer: Callable) -> None:
    """Run the visible `test` of an exercise on the student's `answer` and say how it went.

    An untouched stub raises `NotImplementedError`; that is reported, and the notebook runs on.
    """
    try:
        test(answer)
    except NotImplementedError:
        print(
            f"{answer.__name__}: not written yet. Replace the stub above and run this cell again."
        )
    except AssertionError as error:
        print(f"{answer.__name__}: not right yet. {error}".rstrip())
    else:
        print(f"{answer.__name__}: passed.")
