"""The error that a user can mend."""


class UserError(Exception):
    """Something the user can put right. The message is one line that says what is wrong and names the cure.

    The command line prints it without a traceback and exits with code 2.
    """
