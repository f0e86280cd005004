//! The section `policies`: patterns, and what holds for the keys that match them.

use std::sync::Arc;
use std::time::Duration;

use holdfast_proto::limits::{TAGS_MAX, VALUE_BYTES_DEFAULT, VALUE_BYTES_MAX};

use super::error::Problems;
use super::fields::{Fields, Keys, Set, WAIT_MAX};
use super::tree::Tree;
use super::upstreams::DeclaredUpstreams;
use crate::glob::Glob;
use crate::policy::{Policies, Policy, Window};
use crate::template::TextTemplate;

pub(super) const POLICY: Keys = Keys {
    built: &[
        "match",
        "upstream",
        "ttl",
        "ttl_jitter",
        "eager_refresh_threshold",
        "min_refresh_interval",
        "stale_while_revalidate",
        "stale_if_error",
        "soft_timeout",
        "hard_timeout",
        "error_ttl",
        "retry_base",
        "retry_multiplier",
        "retry_cap",
        "max_value_bytes",
        "tags",
    ],
    not_built: &[
        "min_ttl",
        "max_ttl",
        "keep",
        "negative_ttl",
        "on_not_found",
        "on_empty",
        "refresh",
        "read",
        "fetch_on_miss",
        "placeholder",
        "warm",
        "priority",
    ],
};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);
const MILLISECOND: Duration = Duration::from_millis(1);
const YEAR: Duration = Duration::from_secs(31_557_600);
const RETRY_MULTIPLIER_MAX: f64 = 100.0;
/// A read tries the policies one by one.
const POLICIES_MAX: usize = 10_000;

pub(super) fn policies(
    items: Vec<Tree>,
    upstreams: &DeclaredUpstreams,
    problems: &Problems,
) -> Policies {
    if let Some(item) = items.get(POLICIES_MAX) {
        problems.add(
            &item.place,
            format!("there are more than {POLICIES_MAX} policies"),
        );
    }
    items
        .into_iter()
        .filter_map(|item| {
            policy(
                Fields::open("policies[]", item, &POLICY, problems),
                upstreams,
            )
        })
        .collect()
}

fn policy(mut fields: Fields<'_>, upstreams: &DeclaredUpstreams) -> Option<Policy> {
    if !fields.is_section {
        return None;
    }
    let pattern = required(&mut fields, "match", Glob::parse);
    let upstream = required(&mut fields, "upstream", |name| {
        find_upstream(name, upstreams)
    });
    let tags = tags(&mut fields, pattern.as_ref());
    if let (Some(pattern), Some(upstream)) = (&pattern, &upstream) {
        check_captures(pattern, &upstream.value, upstreams, fields.problems);
    }
    let mut duration = |key, range, default| fields.duration(key, range).unwrap_or(default);
    let ttl = duration("ttl", Duration::ZERO..=YEAR, 60 * SECOND);
    let min_refresh_interval = duration("min_refresh_interval", MILLISECOND..=YEAR, SECOND);
    let soft_timeout = duration("soft_timeout", Duration::ZERO..=WAIT_MAX, 100 * MILLISECOND);
    let hard_timeout = duration("hard_timeout", MILLISECOND..=WAIT_MAX, 4 * SECOND);
    let error_ttl = duration("error_ttl", Duration::ZERO..=DAY, SECOND);
    let retry_base = duration("retry_base", MILLISECOND..=DAY, default_retry_base(ttl));
    let retry_cap = duration("retry_cap", MILLISECOND..=DAY, 60 * SECOND);
    let policy = Policy {
        ttl,
        ttl_jitter: fields.number("ttl_jitter", 0.0..=1.0).unwrap_or(0.10),
        eager_refresh_threshold: fields
            .number("eager_refresh_threshold", 0.0..=1.0)
            .unwrap_or(0.80),
        min_refresh_interval,
        stale_while_revalidate: fields
            .window("stale_while_revalidate")
            .unwrap_or(Window::For(600 * SECOND)),
        stale_if_error: fields
            .window("stale_if_error")
            .unwrap_or(Window::For(30 * DAY)),
        soft_timeout,
        hard_timeout,
        error_ttl,
        retry_base,
        retry_multiplier: fields
            .number("retry_multiplier", 1.0..=RETRY_MULTIPLIER_MAX)
            .unwrap_or(1.5),
        retry_cap,
        max_value_bytes: fields
            .size("max_value_bytes", 1..=VALUE_BYTES_MAX as u64)
            .unwrap_or(VALUE_BYTES_DEFAULT as u64),
        tags,
        pattern: pattern?.value,
        upstream: upstream?.value,
    };
    Some(policy)
}

fn required<T, E: std::fmt::Display>(
    fields: &mut Fields<'_>,
    key: &str,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Option<Set<T>> {
    if !fields.has(key) {
        fields
            .problems
            .add(&fields.place, format!("a policy has no `{key}`"));
    }
    fields.parsed(key, parse)
}

fn find_upstream(name: &str, upstreams: &DeclaredUpstreams) -> Result<Arc<str>, String> {
    if upstreams.get(name).is_some() {
        return Ok(name.into());
    }
    let declared = upstreams
        .names()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ");
    let declared = if declared.is_empty() {
        "no upstream is declared".to_owned()
    } else {
        format!("declared are {declared}")
    };
    Err(format!("no upstream `{name}`: {declared}"))
}

fn tags(fields: &mut Fields<'_>, pattern: Option<&Set<Glob>>) -> Vec<TextTemplate> {
    let place = fields.place_of("tags");
    let problems = fields.problems;
    let mut tags = Vec::new();
    for tag in fields.texts("tags") {
        let wrong =
            |reason: String| problems.add(&tag.place, format!("tag `{}`: {reason}", tag.value));
        match TextTemplate::parse(&tag.value) {
            Err(reason) => wrong(reason.to_string()),
            Ok(_) if tag.value.is_empty() => wrong("it is empty".to_owned()),
            // Tags are replicated and shown: a secret must not get there.
            Ok(template) if template.secrets().next().is_some() => {
                wrong("a secret cannot be in a tag".to_owned())
            }
            Ok(template) => {
                if let Some(pattern) =
                    pattern.filter(|pattern| template.captures_max() > pattern.value.stars())
                {
                    wrong(too_many(template.captures_max(), &pattern.value));
                }
                tags.push(template);
            }
        }
    }
    if tags.len() > TAGS_MAX {
        problems.add(&place, format!("a policy has more than {TAGS_MAX} tags"));
    }
    tags
}

/// What the upstream's url and headers take from a key, the pattern must give.
fn check_captures(
    pattern: &Set<Glob>,
    upstream: &str,
    upstreams: &DeclaredUpstreams,
    problems: &Problems,
) {
    let Some((place, Some(spec))) = upstreams.get(upstream) else {
        return;
    };
    for (what, captures_max) in spec.captures() {
        if captures_max > pattern.value.stars() {
            let reason = format!(
                "upstream `{upstream}` ({place}), {what}: {}",
                too_many(captures_max, &pattern.value)
            );
            problems.add(&pattern.place, reason);
        }
    }
}

fn too_many(captures_max: usize, pattern: &Glob) -> String {
    format!(
        "`{{{captures_max}}}` is not captured: `{pattern}` has {} `*`",
        pattern.stars()
    )
}

fn default_retry_base(ttl: Duration) -> Duration {
    (ttl / 20).max(SECOND)
}
