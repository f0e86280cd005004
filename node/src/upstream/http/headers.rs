//! The headers that the configuration adds to each request.
//!
//! Promises that none of them changes how a message is framed, where it goes or which part of a
//! value it asks for, that only codings are asked for that can be undone, and that each counts as a
//! secret wherever it is logged.

use std::collections::HashSet;
use std::hash::Hash;

use holdfast_proto::Key;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use super::InvalidHttp;
use crate::secret::Secrets;
use crate::template::{Refused, TextTemplate};
use crate::upstream::coding::Coding;

const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("holdfast/", env!("CARGO_PKG_VERSION")));

/// Headers that say how a message is framed, where it goes, or which part of a value is asked for
/// and when: ours to set.
const RESERVED: [HeaderName; 13] = [
    header::HOST,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

/// Checked, in the order of the configuration.
#[derive(Debug)]
pub(super) struct Headers(Vec<(HeaderName, TextTemplate)>);

impl Headers {
    pub(super) fn check(
        headers: &[(String, TextTemplate)],
        secrets: &Secrets,
    ) -> Result<Self, InvalidHttp> {
        let mut checked = Vec::with_capacity(headers.len());
        for (text, template) in headers {
            let name = HeaderName::from_bytes(text.as_bytes())
                .map_err(|_| InvalidHttp::HeaderName(text.clone()))?;
            if RESERVED.contains(&name) {
                return Err(InvalidHttp::ReservedHeader(text.clone()));
            }
            if name == header::ACCEPT_ENCODING {
                check_codings(template)?;
            }
            for secret in template.secrets() {
                let value = secrets
                    .get(secret)
                    .ok_or_else(|| InvalidHttp::NoSuchSecret(secret.to_owned()))?;
                HeaderValue::from_bytes(value.expose().as_bytes())
                    .map_err(|_| InvalidHttp::UnfitSecret(secret.to_owned()))?;
            }
            checked.push((name, template.clone()));
        }
        match repeated(checked.iter().map(|(name, _)| name)) {
            Some(name) => Err(InvalidHttp::RepeatedHeader(name.to_string())),
            None => Ok(Self(checked)),
        }
    }

    /// Ours, the caller's over them, and the configuration's over both.
    pub(super) fn fill(
        &self,
        key: &Key,
        captures: &[&[u8]],
        extra: &HeaderMap,
        secrets: &Secrets,
    ) -> Result<HeaderMap, Refused> {
        let mut headers = plain();
        headers.extend(extra.clone());
        for (name, template) in &self.0 {
            let text = template.fill(key, captures, secrets)?;
            let mut value =
                HeaderValue::from_bytes(text.as_bytes()).map_err(|_| Refused::Control)?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }
}

/// What every request says, also one to a host that may not know the others.
pub(super) fn plain() -> HeaderMap {
    HeaderMap::from_iter([
        (header::ACCEPT, HeaderValue::from_static("*/*")),
        (
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        ),
        (header::USER_AGENT, USER_AGENT),
    ])
}

pub(super) fn repeated<T: Eq + Hash + Copy>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    items.find(|item| !seen.insert(*item))
}

/// `gzip, zstd;q=0.5` and the like: what is asked for must be understood.
fn check_codings(template: &TextTemplate) -> Result<(), InvalidHttp> {
    let text = template.literal().unwrap_or_default();
    let is_known = |item: &str| {
        let name = item.split(';').next().unwrap_or_default().trim();
        !name.is_empty() && Coding::named(name).is_some()
    };
    if text.split(',').all(is_known) {
        Ok(())
    } else {
        Err(InvalidHttp::UnknownCoding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is sensitive is shown by no formatting, and kept out of HTTP/2's tables.
    #[test]
    fn each_configured_header_counts_as_a_secret() {
        let template = TextTemplate::parse("{key} of hunter2").unwrap();
        let configured = [("x-user".to_owned(), template)];
        let headers = Headers::check(&configured, &Secrets::default()).unwrap();
        let key = Key::new("k").unwrap();
        let filled = headers
            .fill(&key, &[], &HeaderMap::new(), &Secrets::default())
            .unwrap();
        assert_eq!(filled["x-user"], "k of hunter2");
        assert!(filled["x-user"].is_sensitive() && !format!("{filled:?}").contains("hunter2"));
    }
}
