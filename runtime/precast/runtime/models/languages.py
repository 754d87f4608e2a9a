"""Languages by their English names, as speech models know them, and the tokens that stand for them in translators."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..inputs.tokenizer import Tokenizer

__all__ = ["CODES", "language_id"]

_TABLE = """
en=english, zh=chinese/mandarin, de=german, es=spanish/castilian, ru=russian, ko=korean, fr=french, ja=japanese,
pt=portuguese, tr=turkish, pl=polish, ca=catalan/valencian, nl=dutch/flemish, ar=arabic, sv=swedish, it=italian,
id=indonesian, hi=hindi, fi=finnish, vi=vietnamese, he=hebrew, uk=ukrainian, el=greek, ms=malay, cs=czech,
ro=romanian/moldavian/moldovan, da=danish, hu=hungarian, ta=tamil, no=norwegian, th=thai, ur=urdu, hr=croatian,
bg=bulgarian, lt=lithuanian, la=latin, mi=maori, ml=malayalam, cy=welsh, sk=slovak, te=telugu, fa=persian,
lv=latvian, bn=bengali, sr=serbian, az=azerbaijani, sl=slovenian, kn=kannada, et=estonian, mk=macedonian,
br=breton, eu=basque, is=icelandic, hy=armenian, ne=nepali, mn=mongolian, bs=bosnian, kk=kazakh, sq=albanian,
sw=swahili, gl=galician, mr=marathi, pa=punjabi/panjabi, si=sinhala/sinhalese, km=khmer, sn=shona, yo=yoruba,
so=somali, af=afrikaans, oc=occitan, ka=georgian, be=belarusian, tg=tajik, sd=sindhi, gu=gujarati, am=amharic,
yi=yiddish, lo=lao, uz=uzbek, fo=faroese, ht=haitian creole/haitian, ps=pashto/pushto, tk=turkmen, nn=nynorsk,
mt=maltese, sa=sanskrit, lb=luxembourgish/letzeburgesch, my=myanmar/burmese, bo=tibetan, tl=tagalog,
mg=malagasy, as=assamese, tt=tatar, haw=hawaiian, ln=lingala, ha=hausa, ba=bashkir, jw=javanese, su=sundanese,
yue=cantonese
"""

CODES = {
    name: code
    for code, _, names in (entry.strip().partition("=") for entry in _TABLE.replace("\n", " ").split(","))
    for name in names.split("/")
}
"""Language code by lower-case name; some languages have several names."""

_TOKEN = re.compile("[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")
"""How mBART (fr_XX), NLLB (fra_Latn) and M2M100 (__fr__) spell languages."""


def language_id(tokenizer: Tokenizer, setting: str, name: str) -> int:
    """The token of a language: its own text, the code in it ("fr", "fra"), or its English name ("french").

    Raises InputError where the tokenizer has none, or several of that code.
    """
    known = {token: index for token, index in tokenizer.added_tokens.items() if _TOKEN.fullmatch(token)}
    code = CODES.get(name.lower(), name.lower())
    found = [name] if name in known else [token for token in known if re.split("_+", token.strip("_"))[0] == code]
    if len(found) == 1:
        return known[found[0]]
    if not known:
        raise InputError(
            f"{setting}={name!r} is text, and this model's tokenizer has no tokens for languages. Give a token's id: "
            f"model.tokenizer.vocabulary_id({name!r})."
        )
    if found:
        raise InputError(f"{setting}={name!r} is any of {', '.join(found)}; give one of them.")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{setting}={name!r} is no language of this model.{hint} It has: {', '.join(sorted(known))}.")
