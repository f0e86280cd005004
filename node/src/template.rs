//! Templates of an upstream's request: what a key and its captures may put into a URL, a header or
//! a tag.
//!
//! Promises that a key can never change a URL's scheme, host or port, nor climb or collapse its
//! path, nor end a header's line: a fill that would is refused, before any call. Must never know
//! who sends what it makes.
//!
//! ```text
//! {key} {1}        in a URL: all bytes but RFC 3986's unreserved ones percent-encoded; elsewhere: as they are
//! {key:path} {1:path}   URLs only: `/` stays, and each piece between is a path segment of its own
//! ${secret:name}   headers only
//! {{ }}            a literal brace
//! ```

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use url::Url;

use crate::secret::Secrets;

/// All but RFC 3986's unreserved characters.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
/// The same, `/` kept.
const ENCODED_PATH: &AsciiSet = &ENCODED.remove(b'/');

/// The URL of an upstream, with placeholders in its path and query only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlTemplate {
    /// Scheme, host and port, no placeholder among them.
    base: String,
    path: Vec<Part>,
    /// With its `?`.
    query: Vec<Part>,
    /// What every filled URL must share with the template.
    origin: url::Origin,
}

/// A header's value or a tag, with placeholders anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextTemplate(Vec<Part>);

/// Why a template is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("a `{{` without its `}}`; write `{{{{` for the brace itself")]
    Unclosed,
    #[error("a `}}` without its `{{`; write `}}}}` for the brace itself")]
    Unopened,
    #[error("`{0}` is no placeholder")]
    Unknown(String),
    #[error("a white space, control character or backslash in a url")]
    Character,
    #[error("a control character")]
    Control,
    #[error("the url is not an absolute http:// or https:// url")]
    NotHttp,
    #[error("the url names a user or password: credentials belong in headers, as ${{secret:name}}")]
    Userinfo,
    #[error("`{0}` outside the url's path and query")]
    Misplaced(String),
    #[error("a `.` or `..` path segment")]
    DotSegment,
    #[error("the url is invalid: {0}")]
    Url(#[from] url::ParseError),
}

/// Why a key cannot be turned into a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the key makes an empty path segment")]
    EmptySegment,
    #[error("the key makes a `.` or `..` path segment")]
    DotSegment,
    #[error("the key puts a control character into a header or tag")]
    Control,
    #[error("the key puts bytes that are not UTF-8 into a header or tag")]
    NotUtf8,
    #[error("the template names a capture that the key's pattern does not have")]
    NoSuchCapture,
    #[error("the template names a secret that is not declared")]
    NoSuchSecret,
    #[error("the key makes no valid url")]
    Url,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Value { source: Source, keeps_slashes: bool },
    Secret(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Key,
    /// Counted from 1.
    Capture(usize),
}

impl UrlTemplate {
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        // The URL standard drops or rewrites these, which would move the borders found below.
        if text
            .chars()
            .any(|c| c.is_whitespace() || c.is_control() || c == '\\')
        {
            return Err(TemplateError::Character);
        }
        let scheme_bytes = ["http://", "https://"]
            .into_iter()
            .find(|scheme| starts_with_ignoring_case(text, scheme));
        let authority_start = scheme_bytes.ok_or(TemplateError::NotHttp)?.len();
        let after = &text[authority_start..];
        let base_bytes = authority_start + after.find(['/', '?', '#']).unwrap_or(after.len());
        let (base, tail) = text.split_at(base_bytes);
        if base.len() == authority_start {
            return Err(TemplateError::NotHttp);
        }
        if base.contains('@') {
            return Err(TemplateError::Userinfo);
        }
        // A fragment is never sent, so it is not kept either.
        let (tail, fragment) = tail.split_once('#').unwrap_or((tail, ""));
        let (path, query) = tail.split_at(tail.find('?').unwrap_or(tail.len()));
        let base = literal_only(base)?;
        literal_only(fragment)?;
        let (path, query) = (parts(path, Kind::Url)?, parts(query, Kind::Url)?);
        let origin = Url::parse(&base)?.origin();
        if segments(&path, |_| Ok(b"x"))
            .is_ok_and(|segments| segments.iter().any(|s| !s.filled && is_dots(&s.bytes)))
        {
            return Err(TemplateError::DotSegment);
        }
        Ok(Self {
            base,
            path,
            query,
            origin,
        })
    }

    /// The highest capture named, 0 if none.
    pub fn captures_max(&self) -> usize {
        captures_max(self.path.iter().chain(&self.query))
    }

    pub fn fill(&self, key: &[u8], captures: &[&[u8]]) -> Result<Url, Refused> {
        for segment in segments(&self.path, |source| source.bytes(key, captures))?
            .iter()
            .filter(|segment| segment.filled)
        {
            if segment.bytes.is_empty() {
                return Err(Refused::EmptySegment);
            }
            if is_dots(&segment.bytes) {
                return Err(Refused::DotSegment);
            }
        }
        let mut text = self.base.clone();
        for part in self.path.iter().chain(&self.query) {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Value {
                    source,
                    keeps_slashes,
                } => {
                    let set = if *keeps_slashes {
                        ENCODED_PATH
                    } else {
                        ENCODED
                    };
                    text.extend(percent_encode(source.bytes(key, captures)?, set));
                }
                Part::Secret(_) => return Err(Refused::Url),
            }
        }
        // Cannot differ after the checks above; a request elsewhere would carry credentials, so it
        // is asked all the same.
        Url::parse(&text)
            .ok()
            .filter(|url| url.origin() == self.origin)
            .ok_or(Refused::Url)
    }
}

impl TextTemplate {
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        if text.chars().any(|c| breaks_a_header(c as u32)) {
            return Err(TemplateError::Control);
        }
        Ok(Self(parts(text, Kind::Text)?))
    }

    /// The highest capture named, 0 if none.
    pub fn captures_max(&self) -> usize {
        captures_max(self.0.iter())
    }

    /// The names of the secrets in it. A tag must have none: tags are replicated and shown.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| {
            if let Part::Secret(name) = part {
                Some(name.as_str())
            } else {
                None
            }
        })
    }

    /// Its text, if that is the same for every key and holds no secret.
    pub fn literal(&self) -> Option<&str> {
        match &self.0[..] {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Whether any of it comes from the key.
    pub fn depends_on_key(&self) -> bool {
        self.0.iter().any(|part| matches!(part, Part::Value { .. }))
    }

    pub fn fill(
        &self,
        key: &[u8],
        captures: &[&[u8]],
        secrets: &Secrets,
    ) -> Result<String, Refused> {
        let mut bytes = Vec::new();
        for part in &self.0 {
            match part {
                Part::Literal(literal) => bytes.extend_from_slice(literal.as_bytes()),
                Part::Value { source, .. } => bytes.extend_from_slice(source.bytes(key, captures)?),
                Part::Secret(name) => bytes.extend_from_slice(
                    secrets
                        .get(name)
                        .ok_or(Refused::NoSuchSecret)?
                        .expose()
                        .as_bytes(),
                ),
            }
        }
        if bytes.iter().any(|byte| breaks_a_header(u32::from(*byte))) {
            return Err(Refused::Control);
        }
        String::from_utf8(bytes).map_err(|_| Refused::NotUtf8)
    }
}

impl Part {
    /// As it was written.
    fn written(&self) -> String {
        match self {
            Self::Literal(text) => text.clone(),
            Self::Secret(name) => format!("${{secret:{name}}}"),
            Self::Value {
                source,
                keeps_slashes,
            } => {
                let name = if let Source::Capture(n) = source {
                    n.to_string()
                } else {
                    "key".to_owned()
                };
                format!("{{{name}{}}}", if *keeps_slashes { ":path" } else { "" })
            }
        }
    }
}

impl Source {
    fn bytes<'a>(self, key: &'a [u8], captures: &[&'a [u8]]) -> Result<&'a [u8], Refused> {
        match self {
            Self::Key => Ok(key),
            Self::Capture(n) => captures.get(n - 1).copied().ok_or(Refused::NoSuchCapture),
        }
    }
}

/// Which placeholders a template may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Url,
    Text,
}

/// Splits a template into literal text, its brace escapes undone, and placeholders.
fn parts(text: &str, kind: Kind) -> Result<Vec<Part>, TemplateError> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let (before, braced) = rest.split_at(at);
        literal.push_str(before);
        if let Some(after) = braced
            .strip_prefix("{{")
            .or_else(|| braced.strip_prefix("}}"))
        {
            literal.push_str(&braced[..1]);
            rest = after;
            continue;
        }
        let inside = braced.strip_prefix('{').ok_or(TemplateError::Unopened)?;
        let (name, after) = inside.split_once('}').ok_or(TemplateError::Unclosed)?;
        let dollar = before.ends_with('$');
        if dollar {
            literal.pop();
        }
        let part = placeholder(name, dollar, kind).ok_or_else(|| {
            TemplateError::Unknown(format!("{}{{{name}}}", if dollar { "$" } else { "" }))
        })?;
        if !literal.is_empty() {
            parts.push(Part::Literal(std::mem::take(&mut literal)));
        }
        parts.push(part);
        rest = after;
    }
    literal.push_str(rest);
    if !literal.is_empty() {
        parts.push(Part::Literal(literal));
    }
    Ok(parts)
}

/// The text of a piece that may have no placeholder.
fn literal_only(text: &str) -> Result<String, TemplateError> {
    let mut literal = String::new();
    for part in parts(text, Kind::Url)? {
        match part {
            Part::Literal(piece) => literal.push_str(&piece),
            placed => return Err(TemplateError::Misplaced(placed.written())),
        }
    }
    Ok(literal)
}

fn placeholder(name: &str, dollar: bool, kind: Kind) -> Option<Part> {
    if dollar {
        let secret = name
            .strip_prefix("secret:")
            .filter(|secret| !secret.is_empty() && kind == Kind::Text)?;
        return Some(Part::Secret(secret.to_owned()));
    }
    let (source, keeps_slashes) = match name.strip_suffix(":path") {
        Some(source) if kind == Kind::Url => (source, true),
        _ => (name, false),
    };
    let source = match source {
        "key" => Source::Key,
        number if number.starts_with(|c: char| ('1'..='9').contains(&c)) => {
            Source::Capture(number.parse().ok()?)
        }
        _ => return None,
    };
    Some(Part::Value {
        source,
        keeps_slashes,
    })
}

/// A path segment before encoding.
struct Segment {
    bytes: Vec<u8>,
    /// Whether a placeholder is in it: only those can be refused.
    filled: bool,
}

/// What lies between the slashes of a path, those of `:path` values included.
fn segments<'a>(
    path: &'a [Part],
    value: impl Fn(Source) -> Result<&'a [u8], Refused>,
) -> Result<Vec<Segment>, Refused> {
    let mut segments = vec![Segment {
        bytes: Vec::new(),
        filled: false,
    }];
    for part in path {
        let (bytes, filled, splits) = match part {
            Part::Literal(literal) => (literal.as_bytes(), false, true),
            Part::Value {
                source,
                keeps_slashes,
            } => (value(*source)?, true, *keeps_slashes),
            Part::Secret(_) => return Err(Refused::Url),
        };
        for (index, piece) in bytes.split(|byte| splits && *byte == b'/').enumerate() {
            if index > 0 {
                segments.push(Segment {
                    bytes: Vec::new(),
                    filled,
                });
            }
            if let Some(last) = segments.last_mut() {
                last.bytes.extend_from_slice(piece);
                last.filled |= filled;
            }
        }
    }
    Ok(segments)
}

/// `.` or `..`, also in the spellings that a URL parser, or a server that decodes twice, takes for
/// them.
fn is_dots(segment: &[u8]) -> bool {
    // Longer than three characters to a dot, it is none.
    segment.len() <= 6
        && matches!(
            String::from_utf8_lossy(segment)
                .to_ascii_lowercase()
                .replace("%2e", ".")
                .as_str(),
            "." | ".."
        )
}

fn breaks_a_header(code: u32) -> bool {
    code < 0x20 && code != u32::from(b'\t') || code == 0x7f
}

fn starts_with_ignoring_case(text: &str, start: &str) -> bool {
    text.get(..start.len())
        .is_some_and(|head| head.eq_ignore_ascii_case(start))
}

fn captures_max<'a>(parts: impl Iterator<Item = &'a Part>) -> usize {
    parts
        .map(|part| {
            if let Part::Value {
                source: Source::Capture(n),
                ..
            } = part
            {
                *n
            } else {
                0
            }
        })
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::secret::Secret;

    fn fill(template: &str, key: &str, captures: &[&str]) -> Result<String, Refused> {
        let captures: Vec<&[u8]> = captures.iter().map(|capture| capture.as_bytes()).collect();
        UrlTemplate::parse(template)
            .unwrap()
            .fill(key.as_bytes(), &captures)
            .map(String::from)
    }

    #[test]
    fn a_url_encodes_all_but_unreserved_bytes() {
        assert_eq!(
            fill("http://h/u/{1}", "", &["aZ09-._~"]).unwrap(),
            "http://h/u/aZ09-._~"
        );
        assert_eq!(
            fill("http://h/u/{1}", "", &["a/b?c#d%e:@é\\\0"]).unwrap(),
            "http://h/u/a%2Fb%3Fc%23d%25e%3A%40%C3%A9%5C%00"
        );
        assert_eq!(
            fill("http://h/{2}/x?q={1}&k={key}#f", "k&1", &["a+b", "c"]).unwrap(),
            "http://h/c/x?q=a%2Bb&k=k%261"
        );
        assert_eq!(
            fill("http://h/{1:path}?p={1:path}", "", &["a/b c"]).unwrap(),
            "http://h/a/b%20c?p=a/b%20c"
        );
        assert_eq!(
            fill("http://h/{key:path}", "a/b", &[]).unwrap(),
            "http://h/a/b"
        );
        assert_eq!(
            fill("http://h/{{1}}/{1}", "", &["x"]).unwrap(),
            "http://h/%7B1%7D/x"
        );
    }

    #[test]
    fn a_template_may_end_in_a_slash_or_have_no_path() {
        assert_eq!(fill("http://h", "k", &[]).unwrap(), "http://h/");
        assert_eq!(fill("http://h?k={key}", "k", &[]).unwrap(), "http://h/?k=k");
        assert_eq!(
            fill("HTTPS://h:8443//a//{key}/", "k", &[]).unwrap(),
            "https://h:8443//a//k/"
        );
    }

    #[test]
    fn a_dot_or_empty_segment_is_refused() {
        for capture in [".", "..", "%2e", "%2E%2e", ".%2e", "%2e."] {
            assert_eq!(
                fill("http://h/u/{1}/x", "", &[capture]),
                Err(Refused::DotSegment),
                "{capture}"
            );
            assert_eq!(
                fill("http://h/u/{1:path}", "", &[&format!("a/{capture}/b")]),
                Err(Refused::DotSegment),
                "{capture}"
            );
        }
        for template in [
            "http://h/.{1}",
            "http://h/{1}{1}",
            "http://h/{1:path}.",
            "http://h/%2e{1}",
        ] {
            assert_eq!(
                fill(template, "", &["."]),
                Err(Refused::DotSegment),
                "{template}"
            );
        }
        for capture in ["", "/a", "a/", "a//b", "/"] {
            assert_eq!(
                fill("http://h/u/{1:path}", "", &[capture]),
                Err(Refused::EmptySegment),
                "{capture}"
            );
        }
        assert_eq!(
            fill("http://h/u/{1}/x", "", &[""]),
            Err(Refused::EmptySegment)
        );
        assert_eq!(
            fill("http://h/u/x{1}y?q={1}", "", &[""]).unwrap(),
            "http://h/u/xy?q="
        );
        assert_eq!(fill("http://h/{1}", "", &["..."]).unwrap(), "http://h/...");
        assert_eq!(
            fill("http://h/x?q={1:path}", "", &["../"]).unwrap(),
            "http://h/x?q=../"
        );
    }

    #[test]
    fn a_placeholder_outside_path_and_query_is_refused() {
        for template in [
            "http://{1}/",
            "http://h{key}",
            "http://h:{1}/",
            "https://{1}.example.com/x",
            "http://h/#{1}",
        ] {
            assert!(
                matches!(
                    UrlTemplate::parse(template),
                    Err(TemplateError::Misplaced(_))
                ),
                "{template}"
            );
        }
        assert_eq!(UrlTemplate::parse("{1}://h/"), Err(TemplateError::NotHttp));
        assert_eq!(
            UrlTemplate::parse("http://u:p@h/"),
            Err(TemplateError::Userinfo)
        );
        assert_eq!(
            UrlTemplate::parse("http://{1}@h/"),
            Err(TemplateError::Userinfo)
        );
    }

    #[test]
    fn a_template_that_is_none_is_refused_by_its_fault() {
        let unknown = |text: &str| Err(TemplateError::Unknown(text.to_owned()));
        assert_eq!(UrlTemplate::parse("http://h/{0}"), unknown("{0}"));
        assert_eq!(UrlTemplate::parse("http://h/{name}"), unknown("{name}"));
        assert_eq!(UrlTemplate::parse("http://h/{1:json}"), unknown("{1:json}"));
        assert_eq!(
            UrlTemplate::parse("http://h/{99999999999999999999}"),
            unknown("{99999999999999999999}")
        );
        assert_eq!(
            UrlTemplate::parse("http://h/${secret:a}"),
            unknown("${secret:a}")
        );
        assert_eq!(
            UrlTemplate::parse("http://h/{1"),
            Err(TemplateError::Unclosed)
        );
        assert_eq!(
            UrlTemplate::parse("http://h/1}"),
            Err(TemplateError::Unopened)
        );
        for template in ["h/x", "ftp://h/x", "http:///x", "http:h", "/x", ""] {
            assert_eq!(
                UrlTemplate::parse(template),
                Err(TemplateError::NotHttp),
                "{template}"
            );
        }
        for template in ["http://h/a b", "http://h/\t", "http:\\\\h/", "http://h/\n"] {
            assert_eq!(
                UrlTemplate::parse(template),
                Err(TemplateError::Character),
                "{template}"
            );
        }
        assert_eq!(
            UrlTemplate::parse("http://h/a/../{1}"),
            Err(TemplateError::DotSegment)
        );
        assert!(matches!(
            UrlTemplate::parse("http://h:99999/"),
            Err(TemplateError::Url(_))
        ));
        assert_eq!(
            TextTemplate::parse("{1:path}"),
            Err(TemplateError::Unknown("{1:path}".to_owned()))
        );
        assert_eq!(
            TextTemplate::parse("${1}"),
            Err(TemplateError::Unknown("${1}".to_owned()))
        );
        assert_eq!(
            TextTemplate::parse("a\r\nb: c"),
            Err(TemplateError::Control)
        );
    }

    #[test]
    fn captures_and_secrets_are_named() {
        assert_eq!(
            UrlTemplate::parse("http://h/{3}?{12}")
                .unwrap()
                .captures_max(),
            12
        );
        assert_eq!(
            UrlTemplate::parse("http://h/{key}").unwrap().captures_max(),
            0
        );
        let header = TextTemplate::parse("{2} ${secret:a} ${secret:b}").unwrap();
        assert_eq!(
            (
                header.captures_max(),
                header.secrets().collect::<Vec<_>>(),
                header.depends_on_key()
            ),
            (2, vec!["a", "b"], true)
        );
        assert_eq!(
            fill("http://h/{2}", "", &["a"]),
            Err(Refused::NoSuchCapture)
        );
    }

    #[test]
    fn a_line_break_in_a_header_is_refused() {
        let mut secrets = Secrets::default();
        secrets.insert("token", Secret::new("t0k"));
        let header = TextTemplate::parse("Bearer ${secret:token} {key}/{1} $5 {{}}").unwrap();
        assert_eq!(
            header.fill("é".as_bytes(), &[b"x"], &secrets).unwrap(),
            "Bearer t0k é/x $5 {}"
        );
        for bad in ["\r", "\n", "\0", "a\r\nb", "\x7f", "\x1b"] {
            assert_eq!(
                header.fill(b"k", &[bad.as_bytes()], &secrets),
                Err(Refused::Control),
                "{bad:?}"
            );
            assert_eq!(
                header.fill(bad.as_bytes(), &[b"x"], &secrets),
                Err(Refused::Control),
                "{bad:?}"
            );
        }
        assert_eq!(
            header.fill(b"\xff", &[b"x"], &secrets),
            Err(Refused::NotUtf8)
        );
        assert_eq!(
            header.fill(b"k", &[b"x"], &Secrets::default()),
            Err(Refused::NoSuchSecret)
        );
        assert_eq!(
            header.fill(b"k", &[], &secrets),
            Err(Refused::NoSuchCapture)
        );
    }

    /// Bytes that parsers trip over, beside any.
    fn nasty() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            prop::sample::select(vec![
                "/", ".", "..", "%2e", "%2F", "?", "#", "@", ":", "\\", "//", "\r\n", "\t", "&",
                "a"
            ])
            .prop_map(|text| text.as_bytes().to_vec()),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    fn path_segments(url: &Url) -> Vec<String> {
        url.path_segments().unwrap().map(str::to_owned).collect()
    }

    proptest! {
        #[test]
        fn a_key_never_changes_where_a_request_goes(key in nasty(), capture in nasty()) {
            let template = UrlTemplate::parse("https://api.example.com:8443/a/{1}/b-{key}?q={1}&k={key:path}").unwrap();
            let Ok(url) = template.fill(&key, &[&capture]) else { return Ok(()) };
            prop_assert_eq!(url.origin().ascii_serialization(), "https://api.example.com:8443");
            prop_assert_eq!((url.username(), url.password(), url.fragment()), ("", None, None));
            let segments = path_segments(&url);
            prop_assert_eq!(segments.len(), 3);
            let decoded: Vec<u8> = percent_encoding::percent_decode_str(&segments[1]).collect();
            prop_assert_eq!(decoded, capture);
            prop_assert_eq!(url.query().unwrap().matches(['&', '=']).count(), 3);
        }

        #[test]
        fn a_path_value_keeps_its_own_segments_and_makes_no_others(key in nasty()) {
            let template = UrlTemplate::parse("http://h/a/{key:path}/z").unwrap();
            let pieces: Vec<&[u8]> = key.split(|byte| *byte == b'/').collect();
            match template.fill(&key, &[]) {
                Ok(url) => {
                    prop_assert_eq!(path_segments(&url).len(), pieces.len() + 2);
                    prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && *piece != b"." && *piece != b".."));
                }
                Err(refused) => prop_assert!(pieces.iter().any(|piece| piece.is_empty() || is_dots(piece)), "{}", refused),
            }
        }

        #[test]
        fn any_text_is_a_template_or_an_error(text in "[a-z{}$:/.?#@1-9 ]{0,40}") {
            let _ = TextTemplate::parse(&text);
            if let Ok(template) = UrlTemplate::parse(&format!("http://h/{text}")) {
                let url = template.fill(b"k", &[b"c".as_slice(); 9]);
                prop_assert!(url.is_err() || url.is_ok_and(|url| url.host_str() == Some("h")));
            }
        }
    }
}
