"""The one class of errors that are about what the user gave, not about this library."""


class InputError(ValueError):
    """Options, files or data that the library cannot work with.

    Examples:
        >>> import jaxhess
        >>> try:
        ...     jaxhess.make_mesh("fsdp=0")
        ... except jaxhess.InputError as error:
        ...     print(type(error).__name__)
        InputError

    The message is one sentence that says what is wrong and what would be right. Commands print it and exit with status
    2; every other exception is a defect, of this library or another, and keeps its traceback.
    """
