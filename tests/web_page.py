"""A page of HTML, taken apart."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects the text, the ids, and everything that points anywhere."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.targets, self.text, self.lang = [], [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "xlink:href", "action", "data", "poster"):
                self.targets.append(value)
            if tag == "html" and name == "lang":
                self.lang = value

    def handle_data(self, data):
        self.text += data
