"""The one exception for mistakes a user can mend: a sentence naming field, rule, value and remedy.

The command line prints it without a traceback and exits with code 2; everything else is a bug of
ours and keeps its traceback. No torch.
"""


class UserError(ValueError):
    """A user's input breaks a rule; the message is one sentence that says how to mend it."""
