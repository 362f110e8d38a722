"""A page as a browser reads it: tags, texts and tables."""

from html.parser import HTMLParser

from report_sample import write_sample

from caftune.report.render import write_report

VOID = {"wbr", "meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, all text, tables as lists of rows, and the text of marks and preformatted blocks."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.tables, self.marks, self.blocks = [], "", {}, [], []
        self.ids, self._open, self._title = [], [], ""
        self.feed(text)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self._open.append(tag)
        if tag == "div" and found.get("class") == "scroll":
            self._title = found["aria-label"]
            self.tables[self._title] = []
        if tag == "tr":
            self.tables[self._title].append([])
        if tag in ("td", "th"):
            self.tables[self._title][-1].append("")
        if tag == "mark":
            self.marks.append("")
        if tag == "pre":
            self.blocks.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[self._title][-1][-1] += data
        if "mark" in self._open:
            self.marks[-1] += data
        if "pre" in self._open:
            self.blocks[-1] += data

    def cell(self, table, row, column):
        (title,) = [title for title in self.tables if title.startswith(table)]
        head, *rows = self.tables[title]
        return next(cells for cells in rows if cells[0] == row)[head.index(column)]


def page_of(folder, found):
    html, _ = write_report([write_sample(folder / "run", found)])
    return Page(html.read_text(encoding="utf-8"))
