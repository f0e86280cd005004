//! The sections `secrets` and `upstreams`: where values come from, and with what credentials.
//!
//! Promises that a secret's text leaves the file or variable it is in for `Secrets` only: no error
//! shows any of it, nor what stands where a secret's place should be named.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use holdfast_proto::limits::FETCH_TIMEOUT_MAX;
use http::{HeaderName, StatusCode};
use url::Host;

use super::Upstream;
use super::error::{Place, Problems};
use super::fields::{Fields, Keys, Set, check_name, text};
use super::layers::Environment;
use super::tree::{Key, Tree, Value};
use crate::secret::{Secret, Secrets};
use crate::template::{TextTemplate, UrlTemplate};
use crate::upstream::Spec;
use crate::upstream::http::{HttpSpec, Tls, Unframed};
use crate::upstream::tls::{read_identity, read_roots};

pub(super) const SECRET: Keys = Keys {
    built: &["file", "env"],
    not_built: &[],
};
pub(super) const UPSTREAM: Keys = Keys {
    built: &["http", "fetch_timeout", "connect_timeout", "max_body_bytes"],
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
    built: &[
        "url",
        "headers",
        "select",
        "accept_status",
        "unframed",
        "redirects",
        "tls",
    ],
    not_built: &["method", "body", "auth", "proxy"],
};
pub(super) const TLS: Keys = Keys {
    built: &["ca", "cert", "key"],
    not_built: &[],
};

const SECRET_BYTES_MAX: u64 = 64 << 10;
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
pub(super) struct DeclaredUpstreams(Vec<(Set<String>, Option<Spec>)>);

impl DeclaredSecrets {
    pub(super) fn into_known(self) -> Secrets {
        self.known
    }
}

impl DeclaredUpstreams {
    /// `None` if nobody declared it; `Some(None)` if it has mistakes of its own.
    pub(super) fn get(&self, name: &str) -> Option<(&Place, Option<&Spec>)> {
        self.0
            .iter()
            .find(|(own, _)| own.value == name)
            .map(|(own, spec)| (&own.place, spec.as_ref()))
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.value.as_str())
    }

    pub(super) fn into_upstreams(self) -> Vec<Upstream> {
        self.0
            .into_iter()
            .filter_map(|(name, spec)| {
                Some(Upstream {
                    name: name.value,
                    spec: spec?,
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
            match environment.get(&env.value) {
                Some(Some(text)) => Ok(text.clone()),
                Some(None) => Err(format!("variable `{}` is not UTF-8", env.value)),
                None => Err(format!("variable `{}` is not set", env.value)),
            },
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
        let spec = upstream(&name, &place, tree, secrets, problems);
        declared.0.push((Set { value: name, place }, spec));
    }
    declared
}

fn upstream(
    name: &str,
    place: &Place,
    tree: Tree,
    secrets: &DeclaredSecrets,
    problems: &Problems,
) -> Option<Spec> {
    let mut fields = Fields::open(format!("upstreams.{name}"), tree, &UPSTREAM, problems);
    let bounds = bounds(&mut fields);
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
    let http = fields.section("http", &HTTP);
    self::http(http, &place, name, bounds, secrets).map(Spec::Http)
}

/// What holds for every kind of upstream.
struct Bounds {
    fetch_timeout: Duration,
    connect_timeout: Duration,
    max_body_bytes: u64,
}

fn bounds(fields: &mut Fields<'_>) -> Bounds {
    let range = Duration::from_millis(1)..=FETCH_TIMEOUT_MAX;
    let place = fields.place_of("connect_timeout");
    let fetch = fields
        .duration("fetch_timeout", range.clone())
        .unwrap_or(HttpSpec::FETCH_TIMEOUT);
    let connect = fields.duration("connect_timeout", range);
    if connect.is_some_and(|connect| connect > fetch) {
        let reason = format!(
            "`{}` is longer than `fetch_timeout`, which counts everything",
            fields.full("connect_timeout")
        );
        fields.problems.add(&place, reason);
    }
    Bounds {
        fetch_timeout: fetch,
        connect_timeout: connect.unwrap_or(HttpSpec::CONNECT_TIMEOUT).min(fetch),
        max_body_bytes: fields
            .size("max_body_bytes", 1..=MAX_BODY_BYTES_MAX)
            .unwrap_or(HttpSpec::MAX_BODY_BYTES),
    }
}

fn http(
    mut http: Fields<'_>,
    place: &Place,
    upstream: &str,
    bounds: Bounds,
    secrets: &DeclaredSecrets,
) -> Option<HttpSpec> {
    let problems = http.problems;
    let had_url = http.has("url");
    let url = http.parsed("url", UrlTemplate::parse);
    if !had_url {
        problems.add(place, format!("upstream `{upstream}` has no `url`"));
    }
    let name = http.full("headers");
    let headers = headers(name, http.take("headers"), secrets, problems);
    let (select, accept_status) = (select(&mut http), accept_status(&mut http));
    let unframed = http.choice(
        "unframed",
        &[("refuse", Unframed::Refuse), ("allow", Unframed::Allow)],
    );
    let redirects = redirects(&mut http);
    let tls = tls(http.section("tls", &TLS));
    let Bounds {
        fetch_timeout,
        connect_timeout,
        max_body_bytes,
    } = bounds;
    Some(HttpSpec {
        url: url?.value,
        headers,
        select,
        accept_status,
        unframed: unframed.map_or(Unframed::Refuse, |set| set.value),
        redirects,
        tls,
        fetch_timeout,
        connect_timeout,
        max_body_bytes,
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

fn accept_status(http: &mut Fields<'_>) -> Vec<StatusCode> {
    let name = http.full("accept_status");
    if !http.has("accept_status") {
        return HttpSpec::ACCEPT_STATUS.to_vec();
    }
    let place = http.place_of("accept_status");
    let mut accepted = Vec::new();
    for Set { value, place } in http.integers("accept_status", 200..=299) {
        let status = u16::try_from(value)
            .ok()
            .and_then(|status| StatusCode::from_u16(status).ok());
        match status {
            Some(StatusCode::PARTIAL_CONTENT) => {
                let reason = format!("`{name}`: 206 is a part, which never replaces a value");
                http.problems.add(&place, reason);
            }
            Some(status) if !accepted.contains(&status) => accepted.push(status),
            _ => http
                .problems
                .add(&place, format!("`{name}` names {value} twice")),
        }
    }
    if accepted.is_empty() {
        http.problems.add(
            &place,
            format!("`{name}` names no status: nothing would be a value"),
        );
    }
    accepted
}

fn redirects(http: &mut Fields<'_>) -> Vec<Host> {
    let name = http.full("redirects");
    let mut hosts = Vec::new();
    for Set { value, place } in http.texts("redirects") {
        let host = Host::parse(&value).ok().filter(|host| {
            // What a url would have around it is told apart from a name.
            !matches!(host, Host::Domain(name) if name.is_empty() || name.contains('*'))
        });
        match host {
            Some(host) if !hosts.contains(&host) => hosts.push(host),
            Some(_) => http
                .problems
                .add(&place, format!("`{name}` names `{value}` twice")),
            None => http.problems.add(
                &place,
                format!(
                    "`{name}`: `{value}` is no host: write only its name, such as `cdn.example.com`"
                ),
            ),
        }
    }
    hosts
}

fn tls(mut fields: Fields<'_>) -> Tls {
    let ca = fields.parsed("ca", |path| read_roots(Path::new(path)));
    let (cert_place, had_cert, had_key) = (
        fields.place_of("cert"),
        fields.has("cert"),
        fields.has("key"),
    );
    let (cert, key) = (fields.text("cert"), fields.text("key"));
    if had_cert != had_key {
        let (here, missing) = if had_cert {
            ("cert", "key")
        } else {
            ("key", "cert")
        };
        let reason = format!("`{}` needs `{missing}` beside it", fields.full(here));
        fields.problems.add(&fields.place, reason);
    }
    let identity = cert.zip(key).and_then(|(cert, key)| {
        read_identity(Path::new(&cert.value), Path::new(&key.value))
            .map_err(|reason| {
                let reason = format!("`{}`: {reason}", fields.full("cert"));
                fields.problems.add(&cert_place, reason);
            })
            .ok()
    });
    Tls {
        roots: ca.map(|set| set.value),
        identity,
    }
}
