//! Settings that are fine alone and not together.

use super::refusals::refused;
use super::*;

fn fits(yaml: &str) {
    let loaded = Fixture::new(yaml).load();
    assert!(loaded.is_ok(), "{yaml}\n{}", loaded.unwrap_err());
}

#[test]
fn times_that_contradict_each_other_are_refused_where_one_was_set() {
    let two = |one: &str, other: &str| policy_with(&format!("{one}\n    {other}"));
    // Both set, or one against the default of the other: the line that was written.
    for (yaml, line, said) in [
        (
            two("hard_timeout: 1ms", "soft_timeout: 5s"),
            9,
            "`soft_timeout` 5s is longer than `hard_timeout` 1ms",
        ),
        (
            policy_with("soft_timeout: 5s"),
            8,
            "longer than `hard_timeout` 4s (default)",
        ),
        (
            policy_with("hard_timeout: 50ms"),
            8,
            "`soft_timeout` 100ms (default) is longer than",
        ),
        (
            two("ttl: 1s", "min_refresh_interval: 1h"),
            9,
            "`min_refresh_interval` 1h is longer than `ttl` 1s",
        ),
        (
            policy_with("min_refresh_interval: 2min"),
            8,
            "longer than `ttl` 1m (default)",
        ),
        (
            two("min_ttl: 1h", "max_ttl: 1min"),
            8,
            "`min_ttl` 1h is longer than `max_ttl` 1m",
        ),
        (
            two("min_ttl: 1h", "ttl: 1min"),
            8,
            "`min_ttl` 1h is longer than `ttl` 1m",
        ),
        (
            two("ttl: 1h", "max_ttl: 1min"),
            8,
            "`ttl` 1h is longer than `max_ttl` 1m",
        ),
        (
            two("retry_base: 1h", "retry_cap: 1s"),
            8,
            "`retry_base` 1h is longer than `retry_cap` 1s",
        ),
        (
            policy_with("retry_base: 2min"),
            8,
            "longer than `retry_cap` 1m (default)",
        ),
    ] {
        refused(&yaml, line, said);
    }
    for fine in [
        two("soft_timeout: 1s", "hard_timeout: 1s"),
        two("ttl: 1s", "min_refresh_interval: 1s"),
        // Defaults give way to what is set.
        policy_with("ttl: 100ms"),
        policy_with("ttl: 1y"),
        policy_with("retry_cap: 10ms"),
        policy_with("min_ttl: 1h"),
        policy_with("max_ttl: 1s"),
    ] {
        fits(&fine);
    }
    let config = load(&policy_with("ttl: 1y"));
    let policy = config.policies.find(b"a/b").unwrap().policy;
    assert_eq!(policy.retry_base, policy.retry_cap);
}

#[test]
fn an_upstream_connects_within_its_fetch_and_a_value_is_no_larger_than_its_body() {
    let upstream = |lines: &str| format!("{UPSTREAM}    {lines}\n");
    refused(
        &upstream("fetch_timeout: 1s\n    connect_timeout: 2s"),
        6,
        "`upstreams.u.connect_timeout` is longer than `fetch_timeout`",
    );
    refused(&upstream("connect_timeout: 5s"), 5, "is longer than");
    let config = load(&upstream("fetch_timeout: 1s"));
    assert_eq!(http(&config).connect_timeout, Duration::from_secs(1));

    let policy = "policies:\n  - match: a/*\n    upstream: u\n    max_value_bytes: 8MiB\n";
    refused(
        &format!("{}{policy}", upstream("max_body_bytes: 1kB")),
        9,
        "is over the `max_body_bytes` 1000 of upstream `u` (",
    );
    fits(&format!("{}{policy}", upstream("max_body_bytes: 8MiB")));
    fits(&upstream("max_body_bytes: 1kB"));
}

#[test]
fn a_policy_that_can_never_match_is_refused_by_its_line() {
    let policies = |patterns: &[&str]| {
        let upstream = UPSTREAM.replace("{1}", "{key}");
        let each = |pattern: &&str| format!("- {{upstream: u, match: '{pattern}'}}\n");
        format!(
            "{upstream}policies:\n{}",
            patterns.iter().map(each).collect::<String>()
        )
    };
    refused(
        &policies(&["*", "user/*"]),
        7,
        "`user/*` can never match: `*` (",
    );
    refused(
        &policies(&["a", "user/*", "b", "user/[0-9]/*"]),
        9,
        ":7) matches all",
    );
    refused(&policies(&["same", "same"]), 7, "`same` can never match");
    fits(&policies(&["user/*/profile", "user/*", "*"]));
    // The command line goes over the file.
    let fixture = Fixture::new(&policies(&["user/*"])).overrides(Overrides::default().prepend(
        "--upstream",
        "policies",
        "[{match: 'user/*', upstream: u}]",
    ));
    assert_eq!(fixture.loaded().policies.iter().count(), 2);
}

#[test]
fn a_size_that_holds_nothing_or_that_nobody_has_is_a_slip() {
    refused("memory: {max_bytes: 1B}\n", 1, "must be from 8388608 to");
    refused("memory: {max_bytes: 5000TiB}\n", 1, "must be from");
    refused(
        "storage: {max_bytes: 1MiB}\n",
        1,
        "must be from 16777216 to",
    );
    refused(
        "storage: {log_keep_bytes: 1kB}\n",
        1,
        "must be from 8388608",
    );
    fits("memory: {max_bytes: 8MiB}\nstorage: {max_bytes: 0.5GiB, log_keep_bytes: 8MiB}\n");
}

#[test]
fn what_is_no_answer_to_want_is_refused() {
    let http = |line: &str| format!("{UPSTREAM}      {line}\n");
    for (line, said) in [
        ("accept_status: [200, 206]", "206 is a part"),
        (
            "accept_status: [200, 404]",
            "a whole number from 200 to 299",
        ),
        ("accept_status: [200, 200]", "names 200 twice"),
        ("accept_status: []", "names no status"),
        ("unframed: maybe", "none of `refuse` or `allow`"),
        ("redirects: ['https://h/']", "is no host"),
        ("redirects: ['*.example.com']", "is no host"),
        ("redirects: [a, A]", "names `A` twice"),
        (
            "tls: {ca: /nonexistent/ca.pem}",
            "`/nonexistent/ca.pem`: No such file",
        ),
        ("tls: {cert: /nonexistent/a}", "needs `key` beside it"),
        ("tls: {key: /nonexistent/a}", "needs `cert` beside it"),
        (
            "tls: {cert: /nonexistent/a, key: /nonexistent/b}",
            "No such file",
        ),
    ] {
        refused(&http(line), 5, said);
    }
    refused(
        &policy_with("accept: [json]"),
        8,
        "`json` is no content type",
    );
    refused(&policy_with("accept: []"), 8, "names no content type");
    refused(&policy_with("on_empty: maybe"), 8, "none of `store`");
    let config = load(&http("redirects: [CDN.example.com, '[::1]', 192.0.2.1]"));
    assert_eq!(super::http(&config).redirects.len(), 3);
}
