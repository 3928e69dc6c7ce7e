"""Captions as words: the Penn Treebank tokeniser that caption scores are defined on, or a plain one where there is no Java.

The Penn Treebank's is the Java program in pycocoevalcap: lower case, punctuation left out.
"""

import os
import re
import shutil
import subprocess

from common import UserError

PTB = "PTB (Stanford CoreNLP 3.4.1, as in pycocoevalcap)"
PLAIN = "plain (no Java: lower case, words split at punctuation, which is left out; scores differ from published ones)"
NO_JAVA = (
    "no Java here: METEOR and SPICE are left out, and words are told apart by a plain tokeniser, so that scores differ a little from "
    "published ones. Install it: apt-get install default-jre-headless, or conda install -c conda-forge openjdk=17"
)
# What Java takes for the end of a line, within a caption: it would shift every caption after it.
LINE_ENDS = {ord(end): " " for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


def java_is_here():
    """Whether a `java` can be run."""
    return shutil.which("java") is not None


def tokenize(texts):
    """list of captions → list of str, words separated by single spaces; by the Penn Treebank's rules where Java is here, else plainly."""
    texts = [text.translate(LINE_ENDS).encode("utf-8", "replace").decode() for text in texts]
    return _tokenize_ptb(texts) if java_is_here() else tokenize_plain(texts)


def _tokenize_ptb(texts):
    """As pycocoevalcap's PTBTokenizer, whose own call writes into the installed package and lets Java's remarks through to the screen."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, program, "-preserveLines", "-lowerCase"]
    given = "\n".join(texts)  # without an end to the last line, as there: a full stop may hang on what follows it
    folder = os.path.dirname(ptbtokenizer.__file__)
    done = subprocess.run(command, cwd=folder, input=given, capture_output=True, encoding="utf-8", check=False)
    lines = done.stdout.split("\n")
    if len(lines) == len(texts) + 1 and not lines[-1]:
        lines.pop()
    if done.returncode or len(lines) != len(texts):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"Java's tokeniser gave {len(lines)} lines for {len(texts)} captions ({reason}). Try `java -version`.")
    left_out = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in left_out) for line in lines]


def tokenize_plain(texts):
    """list of captions → list of str, words separated by single spaces: lower case, split at punctuation, which is left out."""
    return [" ".join(re.findall(r"\w+(?:[-'’.]\w+)*|[^\w\s.,:;!?'\"`…()\[\]{}-]", text.lower())) for text in texts]
