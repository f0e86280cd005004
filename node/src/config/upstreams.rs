//! The sections `secrets` and `upstreams`: where values come from, and with what credentials.
//!
//! Promises that a secret's text leaves the file or variable it is in for `Secrets` only: no error
//! shows any of it, nor what stands where a secret's place should be named.

use std::io::Read;
use std::time::Duration;

use holdfast_proto::limits::FETCH_TIMEOUT_MAX;
use http::HeaderName;

use super::Upstream;
use super::error::{Place, Problems};
use super::fields::{Fields, Keys, Set, check_name, text};
use super::layers::Environment;
use super::tree::{Key, Tree, Value};
use crate::secret::{Secret, Secrets};
use crate::template::{TextTemplate, UrlTemplate};
use crate::upstream::http::HttpSpec;

pub(super) const SECRET: Keys = Keys {
    built: &["file", "env"],
    not_built: &[],
};
pub(super) const UPSTREAM: Keys = Keys {
    built: &["http", "fetch_timeout", "max_body_bytes"],
    not_built: &[
        "max_concurrent",
        "rate_limit",
        "max_backlog",
        "breaker",
        "grpc",
        "postgres",
        "postgresql",
        "mysql",
        "sql",
        "redis",
        "exec",
        "file",
    ],
};
pub(super) const HTTP: Keys = Keys {
    built: &["url", "headers", "select"],
    not_built: &["method", "body", "tls", "auth", "proxy"],
};

const SECRET_BYTES_MAX: u64 = 64 << 10;
const FETCH_TIMEOUT_DEFAULT: Duration = Duration::from_secs(4);
const MAX_BODY_BYTES_DEFAULT: u64 = 8 << 20;
/// `select` may keep little of a large body, but all of it is in memory once per fetch.
const MAX_BODY_BYTES_MAX: u64 = 64 << 20;
const HEADERS_MAX: usize = 64;

/// The secrets, and the names of those that could not be read: one mistake is reported once.
#[derive(Default)]
pub(super) struct DeclaredSecrets {
    known: Secrets,
    names: Vec<String>,
}

/// The upstreams; one with a mistake in it is declared all the same.
#[derive(Default)]
pub(super) struct DeclaredUpstreams(Vec<(Set<String>, Option<HttpSpec>)>);

impl DeclaredSecrets {
    pub(super) fn into_known(self) -> Secrets {
        self.known
    }
}

impl DeclaredUpstreams {
    /// `None` if nobody declared it; `Some(None)` if it has mistakes of its own.
    pub(super) fn get(&self, name: &str) -> Option<(&Place, Option<&HttpSpec>)> {
        self.0
            .iter()
            .find(|(own, _)| own.value == name)
            .map(|(own, http)| (&own.place, http.as_ref()))
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.value.as_str())
    }

    pub(super) fn into_upstreams(self) -> Vec<Upstream> {
        self.0
            .into_iter()
            .filter_map(|(name, http)| {
                Some(Upstream {
                    name: name.value,
                    http: http?,
                    place: name.place,
                })
            })
            .collect()
    }
}

pub(super) fn secrets(
    tree: Option<Tree>,
    environment: &Environment,
    problems: &Problems,
) -> DeclaredSecrets {
    let mut secrets = DeclaredSecrets::default();
    let Some(tree) = tree else { return secrets };
    for (Key { name, place }, tree) in Fields::open_any("secrets", tree, problems).rest() {
        secrets.names.push(name.clone());
        if let Err(reason) = check_name(&name) {
            problems.add(&place, reason);
            continue;
        }
        match &tree.value {
            Value::Map(_) => {}
            Value::Null => {
                problems.add(
                    &place,
                    format!(
                        "secret `{name}` has no source: write `{{file: path}}` or `{{env: NAME}}`"
                    ),
                );
                continue;
            }
            _ => {
                let reason = format!(
                    "secret `{name}` is inline: keep it out of the configuration with `{{file: path}}` or `{{env: NAME}}`"
                );
                problems.add(&tree.place, reason);
                continue;
            }
        }
        if let Some(secret) = secret(&name, tree, environment, problems) {
            secrets.known.insert(name, secret);
        }
    }
    secrets
}

fn secret(
    name: &str,
    tree: Tree,
    environment: &Environment,
    problems: &Problems,
) -> Option<Secret> {
    let mut fields = Fields::open(format!("secrets.{name}"), tree, &SECRET, problems);
    let (had_file, had_env) = (fields.has("file"), fields.has("env"));
    let (file, env) = (fields.text("file"), fields.text("env"));
    if had_file == had_env {
        let which = if had_file {
            "both `file` and `env`"
        } else {
            "neither `file` nor `env`"
        };
        problems.add(
            &fields.place,
            format!("secret `{name}` has {which}: it needs one of them"),
        );
        return None;
    }
    let (read, place) = match (file, env) {
        (Some(file), _) => (read_file(&file.value), file.place),
        (_, Some(env)) => (
            environment
                .get(&env.value)
                .cloned()
                .ok_or_else(|| format!("variable `{}` is not set", env.value)),
            env.place,
        ),
        _ => return None,
    };
    let read = read.and_then(|text| match text.trim_end_matches(['\r', '\n']) {
        "" => Err("it is empty".to_owned()),
        // A header is all a secret can go into yet.
        text if text.chars().any(|c| c.is_ascii_control() && c != '\t') => Err(
            "it has a line break or another control character, which no header may have".to_owned(),
        ),
        text => Ok(Secret::new(text)),
    });
    read.map_err(|reason| problems.add(&place, format!("secret `{name}` cannot be read: {reason}")))
        .ok()
}

fn read_file(path: &str) -> Result<String, String> {
    let in_file = |reason: String| format!("`{path}`: {reason}");
    let file = std::fs::File::open(path).map_err(|error| in_file(error.to_string()))?;
    let mut bytes = Vec::new();
    file.take(SECRET_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| in_file(error.to_string()))?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err(in_file("it is over 64 KiB".to_owned()));
    }
    String::from_utf8(bytes).map_err(|_| in_file("it is not UTF-8".to_owned()))
}

pub(super) fn upstreams(
    tree: Option<Tree>,
    secrets: &DeclaredSecrets,
    problems: &Problems,
) -> DeclaredUpstreams {
    let mut declared = DeclaredUpstreams::default();
    let Some(tree) = tree else { return declared };
    for (Key { name, place }, tree) in Fields::open_any("upstreams", tree, problems).rest() {
        if let Err(reason) = check_name(&name) {
            problems.add(&place, reason);
        }
        let http = upstream(&name, &place, tree, secrets, problems);
        declared.0.push((Set { value: name, place }, http));
    }
    declared
}

fn upstream(
    name: &str,
    place: &Place,
    tree: Tree,
    secrets: &DeclaredSecrets,
    problems: &Problems,
) -> Option<HttpSpec> {
    let mut fields = Fields::open(format!("upstreams.{name}"), tree, &UPSTREAM, problems);
    let timeout = fields.duration(
        "fetch_timeout",
        Duration::from_millis(1)..=FETCH_TIMEOUT_MAX,
    );
    let body = fields.size("max_body_bytes", 1..=MAX_BODY_BYTES_MAX);
    if !fields.is_section {
        return None;
    }
    if !fields.has("http") {
        problems.add(
            place,
            format!("upstream `{name}` has no kind: it needs `http: {{url: …}}`"),
        );
        return None;
    }
    let place = fields.place_of("http");
    let mut http = fields.section("http", &HTTP);
    let had_url = http.has("url");
    let url = http.parsed("url", UrlTemplate::parse);
    if !had_url {
        problems.add(&place, format!("upstream `{name}` has no `url`"));
    }
    let headers = headers(
        http.full("headers"),
        http.take("headers"),
        secrets,
        problems,
    );
    Some(HttpSpec {
        url: url?.value,
        headers,
        select: select(&mut http),
        fetch_timeout: timeout.unwrap_or(FETCH_TIMEOUT_DEFAULT),
        max_body_bytes: body.unwrap_or(MAX_BODY_BYTES_DEFAULT),
    })
}

fn headers(
    section: String,
    tree: Option<Tree>,
    secrets: &DeclaredSecrets,
    problems: &Problems,
) -> Vec<(String, TextTemplate)> {
    let Some(tree) = tree else { return Vec::new() };
    let place = tree.place.clone();
    let mut headers: Vec<(String, TextTemplate)> = Vec::new();
    for (key, tree) in Fields::open_any(section.clone(), tree, problems).rest() {
        if HeaderName::from_bytes(key.name.as_bytes()).is_err() {
            problems.add(&key.place, format!("`{}` is no header name", key.name));
            continue;
        }
        if headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case(&key.name))
        {
            problems.add(&key.place, format!("header `{}` is here twice", key.name));
        }
        let name = format!("{section}.{}", key.name);
        let Some(value) = text(tree, &name, problems) else {
            continue;
        };
        match TextTemplate::parse(&value.value) {
            Ok(template) => {
                for unknown in template
                    .secrets()
                    .filter(|secret| !secrets.names.iter().any(|name| name == secret))
                {
                    problems.add(
                        &value.place,
                        format!("`{name}`: secret `{unknown}` is not declared in `secrets`"),
                    );
                }
                headers.push((key.name, template));
            }
            Err(reason) => problems.add(&value.place, format!("`{name}`: {reason}")),
        }
    }
    if headers.len() > HEADERS_MAX {
        problems.add(
            &place,
            format!("`{section}` has more than {HEADERS_MAX} headers"),
        );
    }
    headers
}

fn select(http: &mut Fields<'_>) -> Vec<String> {
    let name = http.full("select");
    let mut select = Vec::new();
    for Set { value, place } in http.texts("select") {
        if select.contains(&value) {
            http.problems
                .add(&place, format!("`{name}` names field `{value}` twice"));
        }
        select.push(value);
    }
    select
}
