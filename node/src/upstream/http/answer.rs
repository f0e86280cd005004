//! What the head of an answer says: whether it is wanted, how its body is framed and coded, when to
//! come again.

use std::time::Duration;

use holdfast_proto::limits::CONTENT_TYPE_BYTES_MAX;
use holdfast_proto::v1::FailureClass;
use http::header::{self, HeaderMap};
use http::{Response, StatusCode, Version};

use super::{HttpSpec, Unframed};
use crate::upstream::FetchFailed;
use crate::upstream::coding::Coding;

/// A `Retry-After` beyond this counts as this: an upstream's slip must not silence a key for years.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

/// An answer whose body is worth reading.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) content_type: String,
    pub(super) coding: Coding,
    /// As declared, before decoding.
    pub(super) body_bytes: Option<u64>,
}

pub(super) fn judge<B: http_body::Body>(
    answer: &Response<B>,
    spec: &HttpSpec,
) -> Result<Wanted, FetchFailed> {
    let (status, headers) = (answer.status(), answer.headers());
    if !spec.accept_status.contains(&status) {
        return Err(FetchFailed {
            class: FailureClass::Status,
            status: status.as_u16().into(),
            retry_after: retry_after(status, headers),
        });
    }
    let has_body = !answer.body().is_end_stream();
    let is_open = has_body && !is_framed(answer.version(), headers);
    if is_open && spec.unframed == Unframed::Refuse {
        return Err(FailureClass::Incomplete.into());
    }
    let coding = Coding::of(headers).ok_or(FailureClass::Malformed)?;
    let body_bytes = answer.body().size_hint().exact();
    if body_bytes.is_some_and(|bytes| bytes > spec.max_body_bytes) {
        return Err(FailureClass::TooLarge.into());
    }
    Ok(Wanted {
        content_type: content_type(headers),
        coding,
        body_bytes,
    })
}

pub(super) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Whether the message itself says where its body ends. Where only the end of the connection does,
/// a server that died half-way cannot be told from one that was done (RFC 9112 §8).
fn is_framed(version: Version, headers: &HeaderMap) -> bool {
    let codings = headers.get_all(header::TRANSFER_ENCODING);
    let is_chunked = codings.iter().next_back().is_some_and(|value| {
        let last = value.as_bytes().rsplit(|byte| *byte == b',').next();
        last.is_some_and(|last| last.trim_ascii().eq_ignore_ascii_case(b"chunked"))
    });
    version >= Version::HTTP_2 || headers.contains_key(header::CONTENT_LENGTH) || is_chunked
}

/// Both forms of RFC 9110 §10.2.3. A date is an instant of the origin's clock, so it counts from
/// the answer's own `Date` and says nothing without one.
fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if !matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        return None;
    }
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let asked = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a u64 holds are beyond the bound too.
        text.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs)
    } else {
        let until = httpdate::parse_http_date(text).ok()?;
        let now = headers.get(header::DATE)?.to_str().ok()?;
        let now = httpdate::parse_http_date(now.trim()).ok()?;
        until.duration_since(now).unwrap_or_default()
    };
    Some(asked.min(RETRY_AFTER_MAX))
}

/// Of one too long for an entry only what stands before its parameters is kept.
fn content_type(headers: &HeaderMap) -> String {
    let text = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default();
    [text, essence]
        .into_iter()
        .find(|text| text.len() <= CONTENT_TYPE_BYTES_MAX)
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            let name: http::HeaderName = name.parse().unwrap();
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date_by_the_origins_own_clock_and_bounded() {
        let asked = |value: &str, date: Option<&str>| {
            let mut pairs = vec![("retry-after", value)];
            pairs.extend(date.map(|date| ("date", date)));
            retry_after(StatusCode::SERVICE_UNAVAILABLE, &headers(&pairs))
        };
        assert_eq!(asked("120", None), Some(Duration::from_secs(120)));
        assert_eq!(
            asked("99999999999999999999999", None),
            Some(RETRY_AFTER_MAX)
        );
        assert_eq!((asked("+1", None), asked("", None)), (None, None));
        // The origin's clock is decades behind, and that does not matter.
        let date = Some("Fri, 31 Dec 1999 23:59:00 GMT");
        let until = |text| asked(text, date).map(|asked| asked.as_secs());
        assert_eq!(until("Fri, 31 Dec 1999 23:59:59 GMT"), Some(59));
        assert_eq!(until("Friday, 31-Dec-99 23:59:59 GMT"), Some(59));
        assert_eq!(until("Fri Dec 31 23:59:59 1999"), Some(59));
        assert_eq!(until("Fri, 31 Dec 1999 23:00:00 GMT"), Some(0));
        assert_eq!(until("Sun, 31 Dec 2000 23:59:59 GMT"), Some(86_400));
        assert_eq!(until("tomorrow"), None);
        assert_eq!(asked("Fri, 31 Dec 1999 23:59:59 GMT", None), None);
        assert_eq!(asked("Fri, 31 Dec 1999 23:59:59 GMT", Some("x")), None);
        let other = headers(&[("retry-after", "7")]);
        assert_eq!(retry_after(StatusCode::INTERNAL_SERVER_ERROR, &other), None);
    }

    #[test]
    fn a_content_type_fits_an_entry() {
        let kept = |text: &str| content_type(&headers(&[("content-type", text)]));
        assert_eq!(kept("text/html; charset=utf-8"), "text/html; charset=utf-8");
        assert_eq!(
            kept(&format!(
                "text/html; a={}",
                "x".repeat(CONTENT_TYPE_BYTES_MAX)
            )),
            "text/html"
        );
        assert_eq!(kept(&"x".repeat(CONTENT_TYPE_BYTES_MAX + 1)), "");
    }

    #[test]
    fn a_body_is_framed_by_a_length_or_by_chunks() {
        for (version, pairs, framed) in [
            (Version::HTTP_11, &[("content-length", "7")][..], true),
            (Version::HTTP_10, &[("content-length", "7")], true),
            (Version::HTTP_11, &[("transfer-encoding", "chunked")], true),
            (
                Version::HTTP_11,
                &[("transfer-encoding", "gzip, Chunked")],
                true,
            ),
            (Version::HTTP_11, &[("transfer-encoding", "gzip")], false),
            (
                Version::HTTP_11,
                &[("transfer-encoding", "chunked, gzip")],
                false,
            ),
            (Version::HTTP_11, &[("connection", "close")], false),
            (Version::HTTP_10, &[], false),
            (Version::HTTP_2, &[], true),
        ] {
            assert_eq!(is_framed(version, &headers(pairs)), framed, "{pairs:?}");
        }
    }
}
