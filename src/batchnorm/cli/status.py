"""What the command ends in, for shells and for CI."""

#: What a shell expects of a program that Ctrl-C has stopped: 128 + SIGINT.
INTERRUPTED = 130

#: What a shell expects of a program that was given something it cannot use.
MISUSED = 2

#: `bench` has found a result of ours that is wrong.
WRONG_RESULT = 1

#: `inspect` or `diagnose` have found something at or above --fail-on.
FOUND = 1

#: `exercise --check` has refused the answer.
REFUSED = 1
