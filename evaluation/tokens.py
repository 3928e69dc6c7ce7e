"""Captions as words: by the Penn Treebank tokenizer that caption scores are defined on, or by a plain one where there is no Java.

The Penn Treebank tokenizer is the Java program in pycocoevalcap: lower case, punctuation removed.
"""

import os
import shutil
import subprocess

from common import UserError
from prediction.ngrams import tokenize_plain

PTB = "PTB (Stanford CoreNLP 3.4.1, as in pycocoevalcap)"
PLAIN = "plain (no Java: lower case, words split at punctuation, which is removed; scores differ from published ones)"
PLAIN_WORDS = (
    "captions are split by a plain tokenizer, so that scores differ a little from published ones. Install Java: "
    "apt-get install default-jre-headless, or conda install -c conda-forge openjdk=17"
)
# METEOR's program cannot read its own numbers back under a locale that writes 0,5. Java also reads the locale from its own settings.
ENGLISH = "-Duser.language=en -Duser.country=US -Duser.language.format=en -Duser.country.format=US"
JAVA_SETTINGS = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS")  # environment variables; the second has the last word in OpenJDK
# What Java takes for the end of a line: within a caption it would shift every caption after it.
LINE_ENDS = {ord(end): " " for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


def java_is_here():
    """Return whether there is a `java` to run."""
    return shutil.which("java") is not None


def java_environment():
    """Return the environment for a Java program: ours, with an English locale whatever the user's."""
    return os.environ | {name: f"{os.environ.get(name, '')} {ENGLISH}".strip() for name in JAVA_SETTINGS}


def java_reason(said, otherwise):
    """Pick from the output of a failed Java program what went wrong.

    Args:
        said: str, its output.
        otherwise: the reason where Java gave none.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.strip().startswith(("Picked up ", "at "))]
    begins = next((place for place, line in enumerate(lines) if "Exception" in line or "rror" in line), 0)
    return " ".join(lines[begins : begins + 2])[:300] or otherwise


def tokenizer_name():
    """Name the tokenizer that `tokenize` uses on this machine."""
    return PTB if java_is_here() else PLAIN


def tokenize(texts):
    """Split captions into words, by the Penn Treebank's rules where there is Java, else plainly.

    Args:
        texts: list of str.

    Returns:
        List of str, words separated by single spaces.

    Raises:
        UserError: Java fails.
    """
    texts = [text.translate(LINE_ENDS).encode("utf-8", "replace").decode() for text in texts]
    return _tokenize_ptb(texts) if java_is_here() else tokenize_plain(texts)


def _tokenize_ptb(texts):
    """Tokenize as pycocoevalcap's PTBTokenizer, which writes into its installed package and lets Java print to the screen."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, program, "-preserveLines", "-lowerCase"]
    given = "\n".join(texts)  # the last line has no end, as in pycocoevalcap: a full stop may depend on what follows it
    folder = os.path.dirname(ptbtokenizer.__file__)
    done = subprocess.run(
        command, cwd=folder, input=given, capture_output=True, encoding="utf-8", errors="replace", check=False, env=java_environment()
    )
    lines = done.stdout.split("\n")
    if len(lines) == len(texts) + 1 and not lines[-1]:
        lines.pop()
    if done.returncode or len(lines) != len(texts):
        reason = java_reason(done.stderr + done.stdout * bool(done.returncode), "it said nothing")
        raise UserError(f"Java's tokenizer gave {len(lines)} lines for {len(texts)} captions ({reason}). Try `java -version`.")
    removed = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in removed) for line in lines]
