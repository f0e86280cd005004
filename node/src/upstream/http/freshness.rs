//! What the head of an answer says of how long its value is good: `Cache-Control`, `Age`, `Expires`
//! and the validators of RFC 9111 and RFC 5861, as a cache that all of an application shares reads
//! them.
//!
//! Promises that what makes no sense never makes a value live longer: a lifetime that cannot be read
//! is none (RFC 9111 §4.2.1). `private` says nothing here: the application asked for the value, and
//! it is the application that is given it.

use std::time::Duration;

use holdfast_proto::peer::Validators;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::upstream::Said;

/// RFC 9111 §1.2.2: a number of seconds that is too large counts as this.
const SECONDS_MAX: u64 = 1 << 31;
/// A longer validator is none: it would be stored with each entry.
const VALIDATOR_BYTES_MAX: usize = 256;

/// The answer's own words, whatever the policy makes of them.
pub(super) fn said(headers: &HeaderMap) -> Said {
    let control = CacheControl::of(headers);
    let lifetime = control
        .shared_max_age
        .or(control.max_age)
        .or_else(|| expires(headers));
    Said {
        lifetime: match control.no_cache {
            true => Some(Duration::ZERO),
            false => lifetime,
        },
        age: age(headers),
        stale_while_revalidate: control.window(control.stale_while_revalidate),
        stale_if_error: control.window(control.stale_if_error),
        no_store: control.no_store,
    }
}

/// What a later request may ask with whether the value is still the same. `source` is of what this
/// one was asked for with.
pub(super) fn validators(headers: &HeaderMap, source: u64) -> Option<Validators> {
    let text = |name: HeaderName| {
        let text = headers.get(name)?.to_str().ok()?.trim();
        (1..=VALIDATOR_BYTES_MAX)
            .contains(&text.len())
            .then(|| text.to_owned())
    };
    let (etag, last_modified) = (text(header::ETAG), text(header::LAST_MODIFIED));
    (etag.is_some() || last_modified.is_some()).then(|| Validators {
        etag: etag.unwrap_or_default(),
        // Sent back as it came, so that its form is the origin's own.
        last_modified: last_modified.unwrap_or_default(),
        source,
    })
}

/// Asks whether the value that these are of is still the same (RFC 9110 §13.1). Who knows the first
/// header ignores the second.
pub(super) fn ask_whether(known: &Validators, headers: &mut HeaderMap) {
    let both = [
        (header::IF_NONE_MATCH, &known.etag),
        (header::IF_MODIFIED_SINCE, &known.last_modified),
    ];
    for (name, text) in both.into_iter().filter(|(_, text)| !text.is_empty()) {
        if let Ok(value) = HeaderValue::from_str(text) {
            headers.insert(name, value);
        }
    }
}

pub(super) fn is_conditional(headers: &HeaderMap) -> bool {
    headers.contains_key(header::IF_NONE_MATCH) || headers.contains_key(header::IF_MODIFIED_SINCE)
}

/// The directives that matter here. Of one that is repeated the first counts (RFC 9111 §4.2.1).
#[derive(Debug, Default)]
struct CacheControl {
    max_age: Option<Duration>,
    shared_max_age: Option<Duration>,
    stale_while_revalidate: Option<Duration>,
    stale_if_error: Option<Duration>,
    no_store: bool,
    no_cache: bool,
    must_revalidate: bool,
}

impl CacheControl {
    fn of(headers: &HeaderMap) -> Self {
        let mut control = Self::default();
        for line in headers.get_all(header::CACHE_CONTROL) {
            // Bytes that are no ASCII are in no directive that matters.
            let line = String::from_utf8_lossy(line.as_bytes());
            for (name, argument) in directives(&line) {
                control.take(&name, argument.as_deref());
            }
        }
        control
    }

    fn take(&mut self, name: &str, argument: Option<&str>) {
        let seconds = |said: &mut Option<Duration>| {
            said.get_or_insert_with(|| delta_seconds(argument.unwrap_or_default()));
        };
        match name {
            "max-age" => seconds(&mut self.max_age),
            "s-maxage" => seconds(&mut self.shared_max_age),
            "stale-while-revalidate" => seconds(&mut self.stale_while_revalidate),
            "stale-if-error" => seconds(&mut self.stale_if_error),
            "no-store" => self.no_store = true,
            // With an argument it names header fields only, of which none is kept.
            "no-cache" => self.no_cache |= argument.is_none(),
            "must-revalidate" | "proxy-revalidate" => self.must_revalidate = true,
            _ => {}
        }
    }

    /// A stale window: none at all where a stale value must not be served.
    fn window(&self, said: Option<Duration>) -> Option<Duration> {
        match self.must_revalidate || self.no_cache {
            true => Some(Duration::ZERO),
            false => said,
        }
    }
}

/// The directives of one line, in lower case, each with its argument, quoted or not.
fn directives(line: &str) -> Vec<(String, Option<String>)> {
    let mut directives = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let name = rest[..end].trim().to_ascii_lowercase();
        let mut argument = None;
        rest = &rest[end..];
        if let Some(after) = rest.strip_prefix('=') {
            let (read, left) = argument_of(after);
            argument = Some(read);
            rest = left;
        }
        // Whatever stands behind a quoted argument belongs to nothing.
        rest = rest.find(',').map_or("", |comma| &rest[comma + 1..]);
        if !name.is_empty() {
            directives.push((name, argument));
        }
    }
    directives
}

/// A token or a quoted string (RFC 9110 §5.6), and what follows it.
fn argument_of(text: &str) -> (String, &str) {
    let text = text.trim_start();
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(',').unwrap_or(text.len());
        return (text[..end].trim().to_owned(), &text[end..]);
    };
    let mut argument = String::new();
    let mut is_escaped = false;
    for (at, character) in quoted.char_indices() {
        match character {
            _ if is_escaped => {
                argument.push(character);
                is_escaped = false;
            }
            '\\' => is_escaped = true,
            '"' => return (argument, &quoted[at + 1..]),
            _ => argument.push(character),
        }
    }
    // It never ends: nothing in it can be trusted, and nothing follows.
    (String::new(), "")
}

/// What is no number is no time at all.
fn delta_seconds(text: &str) -> Duration {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = match is_number {
        // More digits than a u64 holds are beyond the bound too.
        true => text.parse().unwrap_or(SECONDS_MAX).min(SECONDS_MAX),
        false => 0,
    };
    Duration::from_secs(seconds)
}

/// How old the value was when it was sent. One that cannot be read is ignored (RFC 9111 §5.1).
fn age(headers: &HeaderMap) -> Duration {
    let said = headers.get(header::AGE).and_then(|age| age.to_str().ok());
    said.map_or(Duration::ZERO, |age| delta_seconds(age.trim()))
}

/// Counted from the answer's own `Date`, so that the origin's clock need not be right; without one
/// it says nothing. A date that is none is past (RFC 9111 §5.3).
fn expires(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let expires = headers.get(header::EXPIRES)?;
    let Ok(expires) = httpdate::parse_http_date(expires.to_str().unwrap_or_default().trim()) else {
        return Some(Duration::ZERO);
    };
    let date = httpdate::parse_http_date(text(header::DATE)?).ok()?;
    Some(expires.duration_since(date).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().unwrap();
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    fn said(pairs: &[(&str, &str)]) -> Said {
        super::said(&headers(pairs))
    }

    fn control(line: &str) -> Said {
        said(&[("cache-control", line)])
    }

    fn secs(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    #[test]
    fn an_answer_without_a_word_says_nothing() {
        assert_eq!(said(&[]), Said::default());
        assert_eq!(
            control("public, immutable, private, foo=\"a, max-age=7\""),
            Said::default()
        );
    }

    #[test]
    fn the_shared_lifetime_goes_before_the_private_one_and_both_before_expires() {
        let expires = ("expires", "Fri, 31 Dec 1999 23:59:59 GMT");
        let date = ("date", "Fri, 31 Dec 1999 23:59:00 GMT");
        let all = ("cache-control", "max-age=10, S-MaxAge=20");
        assert_eq!(said(&[all, expires, date]).lifetime, secs(20));
        let private = ("cache-control", "Max-Age = 10");
        assert_eq!(said(&[private, expires, date]).lifetime, secs(10));
        assert_eq!(said(&[expires, date]).lifetime, secs(59));
        assert_eq!(said(&[date]).lifetime, None);
    }

    #[test]
    fn expires_counts_from_the_origins_own_clock() {
        let date = ("date", "Fri, 31 Dec 1999 23:59:00 GMT");
        let past = ("expires", "Fri, 31 Dec 1999 23:00:00 GMT");
        assert_eq!(said(&[past, date]).lifetime, secs(0));
        for wrong in ["0", "-1", "tomorrow", ""] {
            assert_eq!(said(&[("expires", wrong), date]).lifetime, secs(0));
            assert_eq!(said(&[("expires", wrong)]).lifetime, secs(0));
        }
        assert_eq!(said(&[past]).lifetime, None);
        assert_eq!(said(&[past, ("date", "now")]).lifetime, None);
    }

    #[test]
    fn what_makes_no_sense_never_makes_a_value_live_longer() {
        for wrong in [
            "max-age",
            "max-age=",
            "max-age=x",
            "max-age=-1",
            "max-age=1.5",
            "max-age=1e9",
            "max-age=\"60",
            "max-age=60 60",
            "max-age==60",
        ] {
            assert_eq!(control(wrong).lifetime, secs(0), "{wrong}");
        }
        assert_eq!(control("max-age=\"60\"").lifetime, secs(60));
        assert_eq!(control("max-age=60;foo").lifetime, secs(0));
        let first = control("max-age=60, max-age=x, max-age=7");
        assert_eq!(first.lifetime, secs(60), "the first counts");
        let lines = [
            ("cache-control", "max-age=5"),
            ("cache-control", "max-age=9"),
        ];
        assert_eq!(said(&lines).lifetime, secs(5));
        let huge = format!("max-age={}", "9".repeat(40));
        assert_eq!(control(&huge).lifetime, secs(SECONDS_MAX));
        assert_eq!(control(",,  , =, =5, max-age=5").lifetime, secs(5));
    }

    #[test]
    fn who_must_ask_again_serves_nothing_stale() {
        let windows = |line: &str| {
            let said = control(line);
            (said.stale_while_revalidate, said.stale_if_error)
        };
        let both = "stale-while-revalidate=7, stale-if-error=70";
        assert_eq!(windows(both), (secs(7), secs(70)));
        assert_eq!(windows("max-age=9"), (None, None));
        for strict in ["must-revalidate", "Proxy-Revalidate", "no-cache"] {
            let line = format!("{both}, {strict}");
            assert_eq!(windows(&line), (secs(0), secs(0)), "{strict}");
        }
        assert_eq!(control("max-age=9, no-cache").lifetime, secs(0));
        assert_eq!(control("max-age=9, must-revalidate").lifetime, secs(9));
        let fields = control("max-age=9, no-cache=\"set-cookie, x\"");
        assert_eq!((fields.lifetime, fields.stale_if_error), (secs(9), None));
    }

    #[test]
    fn no_store_is_seen_wherever_it_stands() {
        assert!(control("NO-STORE").no_store && control("max-age=9 ,no-store").no_store);
        assert!(said(&[("cache-control", "a"), ("cache-control", "no-store")]).no_store);
        assert!(!control("x=\"no-store\"").no_store && !control("no-stores").no_store);
    }

    #[test]
    fn an_age_is_a_number_of_seconds() {
        let age = |text: &str| said(&[("age", text)]).age.as_secs();
        assert_eq!((age("7"), age(" 7 "), age("x"), age("-7")), (7, 7, 0, 0));
    }

    #[test]
    fn validators_are_asked_with_as_they_came_unless_they_are_too_long() {
        let long = "x".repeat(VALIDATOR_BYTES_MAX + 1);
        let date = "Fri, 31 Dec 1999 23:59:59 GMT";
        let pairs = [("etag", "W/\"v 1\""), ("last-modified", date)];
        let found = validators(&headers(&pairs), 7).unwrap();
        assert_eq!(found.source, 7);
        let mut asked = HeaderMap::new();
        ask_whether(&found, &mut asked);
        let wanted = [("if-none-match", "W/\"v 1\""), ("if-modified-since", date)];
        assert_eq!(asked, headers(&wanted));

        let only_date = validators(&headers(&[("etag", &long), pairs[1]]), 7).unwrap();
        let mut asked = HeaderMap::new();
        ask_whether(&only_date, &mut asked);
        assert_eq!(asked, headers(&wanted[1..]));
        assert_eq!(validators(&headers(&[("etag", &long)]), 7), None);
        assert_eq!(validators(&headers(&[("etag", "")]), 7), None);
    }
}
