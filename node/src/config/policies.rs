//! The section `policies`: patterns, and what holds for the keys that match them.

use std::sync::Arc;
use std::time::Duration;

use holdfast_proto::limits::{TAGS_MAX, VALUE_BYTES_DEFAULT, VALUE_BYTES_MAX};

use super::error::{Place, Problems};
use super::fields::{Fields, Keys, Set, WAIT_MAX};
use super::tree::Tree;
use super::upstreams::DeclaredUpstreams;
use crate::glob::Glob;
use crate::policy::{
    FetchOnMiss, OnNotFound, OriginHeaders, Policies, Policy, Read, default_retry_base,
};
use crate::template::TextTemplate;
use crate::wanted::{MediaRange, OnEmpty, Wanted};

pub(super) const POLICY: Keys = Keys {
    built: &[
        "match",
        "upstream",
        "ttl",
        "min_ttl",
        "max_ttl",
        "origin",
        "ttl_jitter",
        "eager_refresh_threshold",
        "min_refresh_interval",
        "read",
        "fetch_on_miss",
        "placeholder",
        "stale_while_revalidate",
        "stale_if_error",
        "keep",
        "soft_timeout",
        "hard_timeout",
        "negative_ttl",
        "on_not_found",
        "error_ttl",
        "retry_base",
        "retry_multiplier",
        "retry_cap",
        "max_value_bytes",
        "tags",
        "accept",
        "on_empty",
    ],
    not_built: &["refresh", "warm", "priority"],
};

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
    let read: Vec<(Policy, Place)> = items
        .into_iter()
        .filter_map(|item| {
            let fields = Fields::open("policies[]", item, &POLICY, problems);
            policy(fields, upstreams)
        })
        .collect();
    for (at, (policy, place)) in read.iter().enumerate() {
        let covering = read[..at]
            .iter()
            // What the command line puts before the file is meant to go over it.
            .filter(|(_, place)| !matches!(place, Place::Flag(_)))
            .find(|(earlier, _)| earlier.pattern.covers(&policy.pattern));
        if let Some((earlier, earlier_place)) = covering {
            let reason = format!(
                "`{}` can never match: `{}` ({earlier_place}) matches all of its keys before it",
                policy.pattern, earlier.pattern
            );
            problems.add(place, reason);
        }
    }
    read.into_iter().map(|(policy, _)| policy).collect()
}

/// The times of a policy that have to fit each other.
struct Times {
    ttl: Set<Duration>,
    min_ttl: Set<Duration>,
    max_ttl: Set<Duration>,
    min_refresh_interval: Set<Duration>,
    soft_timeout: Set<Duration>,
    hard_timeout: Set<Duration>,
    retry_base: Set<Duration>,
    retry_cap: Set<Duration>,
}

impl Times {
    fn read(fields: &mut Fields<'_>, default: &Policy) -> Self {
        let mut one = |key, range, default| fields.duration_or(key, range, default);
        let ttl = one("ttl", Duration::ZERO..=YEAR, default.ttl);
        let retry_cap = one("retry_cap", MILLISECOND..=DAY, default.retry_cap);
        let retry_base = default_retry_base(ttl.value).min(retry_cap.value);
        let at_rest = default.min_refresh_interval;
        Self {
            min_ttl: one("min_ttl", Duration::ZERO..=YEAR, default.min_ttl),
            max_ttl: one("max_ttl", Duration::ZERO..=YEAR, default.max_ttl),
            min_refresh_interval: one("min_refresh_interval", MILLISECOND..=YEAR, at_rest),
            soft_timeout: one(
                "soft_timeout",
                Duration::ZERO..=WAIT_MAX,
                default.soft_timeout,
            ),
            hard_timeout: one("hard_timeout", MILLISECOND..=WAIT_MAX, default.hard_timeout),
            retry_base: one("retry_base", MILLISECOND..=DAY, retry_base),
            ttl,
            retry_cap,
        }
    }

    fn check(&self, problems: &Problems) {
        let ordered = |(small_name, small): (&str, &Set<Duration>),
                       (large_name, large): (&str, &Set<Duration>),
                       why: &str| {
            if small.value <= large.value {
                return;
            }
            let shown = |set: &Set<Duration>| {
                let default = if set.is_default() { " (default)" } else { "" };
                format!("{}{default}", humantime::format_duration(set.value))
            };
            let place = if small.is_default() {
                &large.place
            } else {
                &small.place
            };
            let reason = format!(
                "`{small_name}` {} is longer than `{large_name}` {}: {why}",
                shown(small),
                shown(large)
            );
            problems.add(place, reason);
        };
        ordered(
            ("soft_timeout", &self.soft_timeout),
            ("hard_timeout", &self.hard_timeout),
            "who has no value at all waits at least as long as who has an old one",
        );
        ordered(
            ("min_ttl", &self.min_ttl),
            ("max_ttl", &self.max_ttl),
            "no lifetime is between the two",
        );
        // The default is brought between the two, as what an origin says is.
        if !self.ttl.is_default() {
            ordered(
                ("min_ttl", &self.min_ttl),
                ("ttl", &self.ttl),
                "no value would live as the policy says",
            );
            ordered(
                ("ttl", &self.ttl),
                ("max_ttl", &self.max_ttl),
                "no value would live as the policy says",
            );
        }
        ordered(
            ("retry_base", &self.retry_base),
            ("retry_cap", &self.retry_cap),
            "the first delay is never longer than the longest",
        );
        // A short ttl alone is refreshed as often as the default interval allows.
        if !self.min_refresh_interval.is_default() {
            ordered(
                ("min_refresh_interval", &self.min_refresh_interval),
                ("ttl", &self.ttl),
                "values would always go stale before they may be refreshed",
            );
        }
    }
}

fn policy(mut fields: Fields<'_>, upstreams: &DeclaredUpstreams) -> Option<(Policy, Place)> {
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
    let wanted = wanted(&mut fields);
    // What pattern and upstream are changes no default.
    let default = Policy::new(Glob::default(), "");
    let times = Times::read(&mut fields, &default);
    times.check(fields.problems);
    let error_ttl = fields.duration("error_ttl", Duration::ZERO..=DAY);
    let negative_ttl = fields.duration("negative_ttl", Duration::ZERO..=YEAR);
    let max_value_bytes = max_value_bytes(&mut fields, upstream.as_ref(), upstreams);
    let pattern = pattern?;
    let policy = Policy {
        ttl: times.ttl.value,
        min_ttl: times.min_ttl.value,
        max_ttl: times.max_ttl.value,
        origin: origin(&mut fields).unwrap_or(default.origin),
        ttl_jitter: fields
            .number("ttl_jitter", 0.0..=1.0)
            .unwrap_or(default.ttl_jitter),
        eager_refresh_threshold: fields
            .number("eager_refresh_threshold", 0.0..=1.0)
            .unwrap_or(default.eager_refresh_threshold),
        min_refresh_interval: times.min_refresh_interval.value,
        read: read(&mut fields).unwrap_or(default.read),
        fetch_on_miss: fetch_on_miss(&mut fields).unwrap_or(default.fetch_on_miss),
        placeholder: fields.text("placeholder").map(|text| text.value.into()),
        stale_while_revalidate: fields
            .window("stale_while_revalidate")
            .unwrap_or(default.stale_while_revalidate),
        stale_if_error: fields
            .window("stale_if_error")
            .unwrap_or(default.stale_if_error),
        keep: fields.window("keep").unwrap_or(default.keep),
        soft_timeout: times.soft_timeout.value,
        hard_timeout: times.hard_timeout.value,
        negative_ttl: negative_ttl.unwrap_or(default.negative_ttl),
        on_not_found: on_not_found(&mut fields).unwrap_or(default.on_not_found),
        error_ttl: error_ttl.unwrap_or(default.error_ttl),
        retry_base: times.retry_base.value,
        retry_multiplier: fields
            .number("retry_multiplier", 1.0..=RETRY_MULTIPLIER_MAX)
            .unwrap_or(default.retry_multiplier),
        retry_cap: times.retry_cap.value,
        wanted,
        max_value_bytes,
        tags,
        upstream: upstream?.value,
        pattern: pattern.value,
    };
    Some((policy, pattern.place))
}

/// No value is larger than what is read of one at all.
fn max_value_bytes(
    fields: &mut Fields<'_>,
    upstream: Option<&Set<Arc<str>>>,
    upstreams: &DeclaredUpstreams,
) -> u64 {
    let (place, problems) = (fields.value_place("max_value_bytes"), fields.problems);
    let Some(bytes) = fields.size("max_value_bytes", 1..=VALUE_BYTES_MAX as u64) else {
        return VALUE_BYTES_DEFAULT as u64;
    };
    let declared = upstream.and_then(|name| Some((name, upstreams.get(&name.value)?)));
    if let Some((name, (upstream_place, Some(spec)))) = declared
        && bytes > spec.max_body_bytes()
    {
        let reason = format!(
            "`max_value_bytes` {bytes} is over the `max_body_bytes` {} of upstream `{}` ({upstream_place}): no value is larger than its body",
            spec.max_body_bytes(),
            name.value
        );
        problems.add(&place, reason);
    }
    bytes
}

fn wanted(fields: &mut Fields<'_>) -> Wanted {
    let name = fields.full("accept");
    let problems = fields.problems;
    let parse = |Set { value, place }: Set<String>| {
        MediaRange::parse(&value)
            .map_err(|reason| problems.add(&place, format!("`{name}`: {reason}")))
            .ok()
    };
    if fields.is_empty_list("accept") {
        let reason = format!("`{name}` names no content type: nothing would be a value");
        problems.add(&fields.place_of("accept"), reason);
    }
    let accept = fields
        .texts("accept")
        .into_iter()
        .filter_map(parse)
        .collect();
    let on_empty = fields.choice(
        "on_empty",
        &[
            ("store", OnEmpty::Store),
            ("keep_old", OnEmpty::KeepOld),
            ("error", OnEmpty::Error),
        ],
    );
    Wanted {
        accept,
        on_empty: on_empty.map(|set| set.value).unwrap_or_default(),
    }
}

fn origin(fields: &mut Fields<'_>) -> Option<OriginHeaders> {
    let choices = [
        ("honour", OriginHeaders::Honour),
        ("ignore", OriginHeaders::Ignore),
    ];
    Some(fields.choice("origin", &choices)?.value)
}

fn on_not_found(fields: &mut Fields<'_>) -> Option<OnNotFound> {
    let choices = [
        ("keep_old", OnNotFound::KeepOld),
        ("negative", OnNotFound::Negative),
    ];
    Some(fields.choice("on_not_found", &choices)?.value)
}

fn read(fields: &mut Fields<'_>) -> Option<Read> {
    let choices = [
        ("refresh_ahead", Read::RefreshAhead),
        ("network_first", Read::NetworkFirst),
    ];
    Some(fields.choice("read", &choices)?.value)
}

fn fetch_on_miss(fields: &mut Fields<'_>) -> Option<FetchOnMiss> {
    let choices = [("sync", FetchOnMiss::Sync), ("async", FetchOnMiss::Async)];
    Some(fields.choice("fetch_on_miss", &choices)?.value)
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
