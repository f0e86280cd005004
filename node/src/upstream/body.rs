//! What becomes of a whole body: checked as JSON where it says it is, cut down to the selected
//! fields where some are.
//!
//! Promises that what is not cut down goes byte for byte but for a byte order mark, that a selected field keeps its exact
//! text (a number is never rounded), and that no body, however deep, overflows the stack: nothing
//! here recurses into values. Must never know where a body came from.

use std::fmt;

use bytes::Bytes;
use holdfast_proto::v1::FailureClass;
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::Value;

/// What to store of a body. `select` names top-level fields; empty means all of it.
pub(super) fn value(
    body: Bytes,
    content_type: String,
    select: &[String],
) -> Result<Value, FailureClass> {
    let is_to_be_json = !select.is_empty() || is_json(&content_type);
    let body = if is_to_be_json {
        without_mark(body)
    } else {
        body
    };
    if !select.is_empty() {
        return Ok(Value {
            body: selected(&body, select)?,
            content_type: "application/json".to_owned(),
        });
    }
    if is_json(&content_type) {
        serde_json::from_str::<IgnoredAny>(text(&body)?).map_err(|_| FailureClass::Malformed)?;
    }
    Ok(Value { body, content_type })
}

/// Without the byte order mark that some put before JSON though none may (RFC 8259 §8.1): those who
/// read the value would stumble over it.
fn without_mark(body: Bytes) -> Bytes {
    if body.starts_with(b"\xef\xbb\xbf") {
        body.slice(3..)
    } else {
        body
    }
}

/// `application/json` or any `+json`, whatever its parameters.
fn is_json(content_type: &str) -> bool {
    let essence = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

/// Asked first, because skipping over JSON does not look into its strings.
fn text(body: &[u8]) -> Result<&str, FailureClass> {
    std::str::from_utf8(body).map_err(|_| FailureClass::Malformed)
}

/// An object of just those fields, in the order of `select`.
fn selected(body: &[u8], select: &[String]) -> Result<Bytes, FailureClass> {
    let mut json = serde_json::Deserializer::from_str(text(body)?);
    let values = Fields(select)
        .deserialize(&mut json)
        .map_err(|_| FailureClass::Malformed)?;
    json.end().map_err(|_| FailureClass::Malformed)?;
    let mut object = String::from("{");
    for (name, value) in select.iter().zip(values) {
        if object.len() > 1 {
            object.push(',');
        }
        object.push_str(&serde_json::Value::from(name.as_str()).to_string());
        object.push(':');
        object.push_str(value.ok_or(FailureClass::MissingField)?.get());
    }
    object.push('}');
    Ok(object.into())
}

/// Finds the raw values of the named fields of an object; of a repeated field, the last, as most
/// parsers do.
struct Fields<'a>(&'a [String]);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Vec<Option<&'de RawValue>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Vec<Option<&'de RawValue>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = vec![None; self.0.len()];
        while let Some(name) = map.next_key::<String>()? {
            match self.0.iter().position(|wanted| *wanted == name) {
                Some(index) => values[index] = Some(map.next_value::<&RawValue>()?),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(body: &str, names: &[&str]) -> Result<String, FailureClass> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let fetched = value(
            Bytes::copy_from_slice(body.as_bytes()),
            "text/html".to_owned(),
            &names,
        )?;
        assert_eq!(fetched.content_type, "application/json");
        Ok(String::from_utf8(fetched.body.to_vec()).unwrap())
    }

    fn whole(body: &[u8], content_type: &str) -> Result<Value, FailureClass> {
        value(Bytes::copy_from_slice(body), content_type.to_owned(), &[])
    }

    #[test]
    fn selected_fields_keep_their_exact_text_in_the_order_asked_for() {
        let body = r#" {"b": 1.10000000000000000000001e+400 , "x":[1], "a\u0062": {"k" : "\u00e9" }, "a": null, "b ": 2} "#;
        assert_eq!(
            select(body, &["ab", "b", "a"]).unwrap(),
            r#"{"ab":{"k" : "\u00e9" },"b":1.10000000000000000000001e+400,"a":null}"#
        );
        assert_eq!(select(r#"{"a\"b":1}"#, &["a\"b"]).unwrap(), r#"{"a\"b":1}"#);
        assert_eq!(select(r#"{"a":1,"a":2}"#, &["a"]).unwrap(), r#"{"a":2}"#);
    }

    #[test]
    fn a_missing_field_fails() {
        assert_eq!(
            select(r#"{"a":1,"in":{"b":2}}"#, &["a", "b"]),
            Err(FailureClass::MissingField)
        );
        assert_eq!(select("{}", &["a"]), Err(FailureClass::MissingField));
    }

    #[test]
    fn with_select_only_a_whole_object_will_do() {
        for body in [
            "",
            "[]",
            "1",
            "null",
            r#""a""#,
            r#"{"a":1"#,
            r#"{"a":1}x"#,
            r#"{"a":1}{"a":2}"#,
            r#"{"a":tru}"#,
            r#"{"a":1,"b":}"#,
        ] {
            assert_eq!(select(body, &["a"]), Err(FailureClass::Malformed), "{body}");
        }
    }

    #[test]
    fn a_body_that_says_it_is_json_must_be() {
        for content_type in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/problem+json",
            "image/x+JSON ;a=b",
        ] {
            assert!(whole(b" [1, {}] ", content_type).is_ok(), "{content_type}");
            for body in [
                &b""[..],
                b"{",
                b"{}}",
                b"<html>",
                b"\"\xff\"",
                b"NaN",
                b"[1,]",
            ] {
                assert_eq!(
                    whole(body, content_type),
                    Err(FailureClass::Malformed),
                    "{content_type} {body:?}"
                );
            }
        }
    }

    #[test]
    fn a_byte_order_mark_before_json_is_left_out_and_elsewhere_kept() {
        let marked = b"\xef\xbb\xbf{\"a\": 1}";
        assert_eq!(
            whole(marked, "application/json").unwrap().body,
            "{\"a\": 1}"
        );
        assert_eq!(select("\u{feff}{\"a\": 1}", &["a"]).unwrap(), "{\"a\":1}");
        assert_eq!(whole(marked, "text/plain").unwrap().body, &marked[..]);
        assert!(whole(b"\xef\xbb\xbf", "application/json").is_err());
    }

    #[test]
    fn any_other_body_is_opaque() {
        for content_type in [
            "",
            "text/plain",
            "application/jsonl",
            "text/json",
            "application/octet-stream; a=application/json",
        ] {
            for body in [&b""[..], b"{", b"\xff\0"] {
                assert_eq!(
                    whole(body, content_type).unwrap().body,
                    body,
                    "{content_type}"
                );
            }
        }
    }

    #[test]
    fn deep_json_overflows_no_stack() {
        let deep = format!("{}{}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(whole(deep.as_bytes(), "application/json").is_ok());
        assert!(select(&format!(r#"{{"b":{deep},"a":{deep}}}"#), &["a"]).is_ok());
        assert_eq!(
            whole("[".repeat(1_000_000).as_bytes(), "application/json"),
            Err(FailureClass::Malformed)
        );
        assert_eq!(
            select(&r#"{"a":"#.repeat(100_000), &["a"]),
            Err(FailureClass::Malformed)
        );
    }
}
