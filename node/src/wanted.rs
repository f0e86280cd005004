//! Which of the values that an upstream brought are wanted: what a policy accepts, and what never
//! takes the place of a good value.
//!
//! Promises that a login page, an error page or nothing at all, sent with a status that says all is
//! well, does not replace what was good before it (P3). Must never know how a value was fetched.

use holdfast_proto::v1::{FailureClass, Origin};

use crate::upstream::Value;

/// What a policy says of the values it stores.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    pub accept: Accept,
    pub on_empty: OnEmpty,
}

/// Content types that are values. None named: all, but HTML only where HTML was before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Accept(Vec<MediaRange>);

/// What becomes of an empty body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnEmpty {
    /// It is a value as any other.
    #[default]
    Store,
    /// A failure over a stored value that is not empty, else a value.
    KeepOld,
    /// Always a failure.
    Error,
}

/// `text/html`, `text/*` or `*/*`, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaRange {
    main: String,
    sub: String,
}

/// What is stored and could still be served.
#[derive(Debug, Clone, Copy)]
pub struct Before<'a> {
    pub content_type: &'a str,
    pub origin: Origin,
    pub is_empty: bool,
}

impl Wanted {
    pub fn judge(&self, value: &Value, before: Option<Before<'_>>) -> Result<(), FailureClass> {
        let is_unwanted = value.body.is_empty()
            && match self.on_empty {
                OnEmpty::Store => false,
                OnEmpty::KeepOld => before.is_some_and(|before| !before.is_empty),
                OnEmpty::Error => true,
            };
        if is_unwanted {
            return Err(FailureClass::Empty);
        }
        if self.accept.takes(&value.content_type, before) {
            Ok(())
        } else {
            Err(FailureClass::ContentType)
        }
    }
}

impl Accept {
    fn takes(&self, content_type: &str, before: Option<Before<'_>>) -> bool {
        let essence = essence(content_type);
        if !self.0.is_empty() {
            return self.0.iter().any(|range| range.matches(&essence));
        }
        !is_html(&essence) || before.is_none_or(may_become_html)
    }
}

impl FromIterator<MediaRange> for Accept {
    fn from_iter<I: IntoIterator<Item = MediaRange>>(ranges: I) -> Self {
        Self(ranges.into_iter().collect())
    }
}

impl MediaRange {
    /// Without parameters: what a value is does not depend on them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no content type: write it like `application/json`, `text/*` or `*/*`"
            )
        };
        let (main, sub) = text.split_once('/').ok_or_else(wrong)?;
        let is_word = |part: &str| part == "*" || !part.is_empty() && part.bytes().all(is_token);
        if !is_word(main) || !is_word(sub) || main == "*" && sub != "*" {
            return Err(wrong());
        }
        Ok(Self {
            main: main.to_ascii_lowercase(),
            sub: sub.to_ascii_lowercase(),
        })
    }

    /// A value without a content type is matched by `*/*` only.
    fn matches(&self, essence: &str) -> bool {
        let (main, sub) = essence.split_once('/').unwrap_or_default();
        (self.main == "*" || self.main == main) && (self.sub == "*" || self.sub == sub)
    }
}

/// A client's Set need not say what it holds; what an upstream brought without a word was no HTML.
fn may_become_html(before: Before<'_>) -> bool {
    let is_unsaid = before.content_type.is_empty() && before.origin != Origin::Fetched;
    is_unsaid || is_html(&essence(before.content_type))
}

fn is_html(essence: &str) -> bool {
    matches!(essence, "text/html" | "application/xhtml+xml")
}

/// What stands before the parameters.
fn essence(content_type: &str) -> String {
    let essence = content_type.split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
}

/// RFC 9110 §5.6.2, without `*`.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(body: &'static str, content_type: &str) -> Value {
        Value {
            body: body.into(),
            content_type: content_type.to_owned(),
        }
    }

    fn before(content_type: &str, origin: Origin) -> Before<'_> {
        Before {
            content_type,
            origin,
            is_empty: false,
        }
    }

    #[test]
    fn without_accept_html_never_replaces_what_was_not_html() {
        let judged = |content_type: &str, before: Option<Before<'_>>| {
            Wanted::default().judge(&value("<h1>log in", content_type), before)
        };
        let unwanted = Err(FailureClass::ContentType);
        for html in [
            "text/html",
            "Text/HTML; charset=utf-8",
            "application/xhtml+xml",
        ] {
            for kind in ["text/plain", "application/json", "image/png", ""] {
                let before = before(kind, Origin::Fetched);
                assert_eq!(judged(html, Some(before)), unwanted, "{kind}");
                assert_eq!(judged("text/plain", Some(before)), Ok(()), "{kind}");
            }
            let was_set = before("application/json", Origin::Set);
            assert_eq!(judged(html, Some(was_set)), unwanted);
            for welcome in [
                before("text/html;charset=ascii", Origin::Fetched),
                before("", Origin::Set),
            ] {
                assert_eq!(judged(html, Some(welcome)), Ok(()));
            }
            assert_eq!(judged(html, None), Ok(()));
        }
    }

    #[test]
    fn accept_names_what_is_a_value() {
        let accept = |ranges: &[&str]| Wanted {
            accept: ranges
                .iter()
                .map(|text| MediaRange::parse(text).unwrap())
                .collect(),
            ..Default::default()
        };
        let takes = |wanted: &Wanted, content_type: &str| {
            let before = before("text/html", Origin::Fetched);
            wanted
                .judge(&value("x", content_type), Some(before))
                .is_ok()
        };
        let json = accept(&["application/JSON", "text/*"]);
        for (content_type, is_taken) in [
            ("application/json; a=b", true),
            ("TEXT/css", true),
            ("text/html", true),
            ("application/jsonl", false),
            ("application/problem+json", false),
            ("", false),
        ] {
            assert_eq!(takes(&json, content_type), is_taken, "{content_type}");
        }
        assert!(takes(&accept(&["*/*"]), "") && takes(&accept(&["*/*"]), "a/b"));
        for wrong in [
            "", "json", "*/json", "text/", "/x", "a/b;c=d", "a b/c", "te*t/x",
        ] {
            assert!(MediaRange::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_empty_body_is_a_value_unless_the_policy_says_otherwise() {
        let judged = |on_empty, body, before: Option<Before<'_>>| {
            let wanted = Wanted {
                on_empty,
                ..Default::default()
            };
            wanted.judge(&value(body, "text/plain"), before).is_ok()
        };
        let old = before("text/plain", Origin::Fetched);
        for (on_empty, over_a_value, on_a_miss) in [
            (OnEmpty::Store, true, true),
            (OnEmpty::KeepOld, false, true),
            (OnEmpty::Error, false, false),
        ] {
            assert_eq!(judged(on_empty, "", Some(old)), over_a_value);
            assert_eq!(judged(on_empty, "", None), on_a_miss);
            let empty = Before {
                is_empty: true,
                ..old
            };
            assert_eq!(judged(on_empty, "", Some(empty)), on_a_miss);
            assert!(judged(on_empty, "x", Some(old)) && judged(on_empty, "x", None));
        }
    }
}
