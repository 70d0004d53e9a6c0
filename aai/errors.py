"""The one error type for mistakes a user can mend, and how others' words are shown."""


class UserError(ValueError):
    """A wrong setting or input: printed as one line, exit code 2, no traceback.

    setting: the name of the setting or file; value: what it holds; rule: what it breaks; remedy: what to do.
    """

    def __init__(self, setting: str, value: object, rule: str, remedy: str) -> None:
        self.setting, self.value, self.rule, self.remedy = setting, value, rule, remedy
        super().__init__(setting, value, rule, remedy)

    def __str__(self) -> str:
        text = f"{self.setting}={self.value}: {self.rule}; {self.remedy}"
        return " ".join(text.split())


def printable(text: object) -> str:
    """Up to 200 characters of what somebody else wrote, without any that would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:200])
