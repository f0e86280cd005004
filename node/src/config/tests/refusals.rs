//! Every mistake is reported by its file and line.

use super::*;

/// Asserts that `yaml` has exactly one mistake, in this line, with this said of it.
#[track_caller]
pub(super) fn refused(yaml: &str, line: u64, said: &str) {
    let complaints = Fixture::new(yaml).complaints();
    let expected = format!("holdfastd.yaml:{line}: ");
    assert!(
        complaints.starts_with(&expected),
        "wanted {expected}…, got {complaints}"
    );
    assert!(
        complaints.contains(said),
        "wanted …{said}…, got {complaints}"
    );
    assert_eq!(complaints.lines().count(), 1, "{complaints}");
}

#[test]
fn a_wrong_variable_or_flag_is_named() {
    let complaints = |name: &str, value: &str| Fixture::new("").variable(name, value).complaints();
    assert_eq!(
        complaints("HOLDFAST__NODE__NMAE", "x"),
        "HOLDFAST__NODE__NMAE: unknown key `nmae` in `node`: did you mean `name`?"
    );
    assert_eq!(
        complaints("HOLDFAST__NODE", "{nmae: x}"),
        "HOLDFAST__NODE: unknown key `nmae` in `node`: did you mean `name`?"
    );
    assert!(
        complaints("HOLDFAST__READS__SESSION_WAIT", "100").starts_with(
            "HOLDFAST__READS__SESSION_WAIT: `reads.session_wait`: the bare number 100"
        )
    );
    assert!(
        complaints("HOLDFAST__CLUSTER__DISCOVER", "[a:1")
            .starts_with("HOLDFAST__CLUSTER__DISCOVER: not valid YAML")
    );
    assert!(complaints("HOLDFAST__", "1").contains("HOLDFAST__: names no key"));
    assert!(complaints("HOLDFAST__NODE____NAME", "1").contains("names no key"));
    assert!(
        complaints("HOLDFAST__LISTEN__CLIENT", "0.0.0.0:1")
            .starts_with("HOLDFAST__LISTEN__CLIENT: `listen.client` 0.0.0.0:1 is not on loopback")
    );
    let listed = Fixture::new("policies: []\n")
        .variable("HOLDFAST__POLICIES__0__TTL", "1s")
        .complaints();
    assert!(
        listed.starts_with("HOLDFAST__POLICIES__0__TTL: `0` is looked for in a list"),
        "{listed}"
    );
    let inline = complaints("HOLDFAST__SECRETS__TOKEN", "hunter2");
    assert!(
        inline.starts_with("HOLDFAST__SECRETS__TOKEN: secret `token` is inline")
            && !inline.contains("hunter2"),
        "{inline}"
    );

    let flag = Fixture::new("")
        .overrides(Overrides::default().text("--data-dir", "node.data_dir", ""))
        .complaints();
    assert_eq!(flag, "--data-dir: `node.data_dir`: the path is empty");
}

#[test]
fn a_learner_needs_a_cluster_to_join() {
    refused(
        "node:\n  role: learner\n",
        2,
        "`node.role: learner` needs `cluster.discover`",
    );
}

#[test]
fn what_is_no_yaml_says_its_line() {
    refused(
        "node:\n  name: a\n  role: [voter\nlisten: {}\n",
        4,
        "not valid YAML",
    );
    refused("node:\n  name: a\n bad: 1\n", 3, "not valid YAML");
    refused(
        "node:\n  name: a\n  name: b\n",
        3,
        "key `name` is here twice",
    );
    refused(
        "node: {}\nlisten: {}\nnode: {}\n",
        3,
        "key `node` is here twice",
    );
    refused("a: 1\n---\nb: 2\n", 3, "not valid YAML");
    refused(
        "\n- a\n",
        2,
        "the configuration wants keys and values, not a list",
    );
    let fixture = Fixture::new("");
    std::fs::write(fixture.file(), b"node:\n  name: \xff\n").unwrap();
    assert_eq!(fixture.complaints(), "holdfastd.yaml:2: is not UTF-8");
    std::fs::remove_file(fixture.file()).unwrap();
    assert!(
        fixture
            .complaints()
            .starts_with("holdfastd.yaml: cannot be read: No such file")
    );
}

#[test]
fn an_unknown_key_is_no_key_not_built() {
    refused(
        "nodes: {}\n",
        1,
        "unknown key `nodes`: did you mean `node`?",
    );
    refused(
        "node:\n  nmae: x\n",
        2,
        "unknown key `nmae` in `node`: did you mean `name`?",
    );
    refused(
        "storage:\n  engine: memory\n  colour: red\n",
        3,
        "unknown key `colour` in `storage`",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: http://h/\n      timeout: 1s\n",
        5,
        "unknown key `timeout` in `upstreams.u.http`",
    );
    refused(
        "security:\n  tls: {}\n",
        2,
        "`tls` in `security` is not built yet",
    );
    refused(
        "upstreams:\n  u:\n    http: {url: http://h/}\n    breaker: {}\n",
        4,
        "`breaker` in `upstreams.u` is not built yet",
    );
    refused(
        &policy_with("colour: red"),
        8,
        "unknown key `colour` in `policies[]`",
    );
    for key in ["refresh", "warm", "priority"] {
        refused(
            &policy_with(&format!("{key}: 1")),
            8,
            &format!("`{key}` in `policies[]` is not built yet"),
        );
    }
    for key in ["max_concurrent", "rate_limit", "max_backlog", "breaker"] {
        refused(&format!("{UPSTREAM}    {key}: 1\n"), 5, "not built yet");
    }
}

#[test]
fn a_wrong_type_is_refused() {
    refused(
        "node: here\n",
        1,
        "`node` wants keys and values, not a text",
    );
    refused(
        "node:\n  name: 7\n",
        2,
        "`node.name` wants a text, not a number: put it in quotes",
    );
    refused("node:\n  name: [a]\n", 2, "not a list");
    refused(
        "node:\n  role: king\n",
        2,
        "`king` is none of `voter` or `learner`",
    );
    refused(
        "cluster:\n  expect: '3'\n",
        2,
        "`cluster.expect` wants a whole number from 1 to 64, not a text",
    );
    refused(
        "cluster:\n  expect: 1\n  discover: a:1\n",
        3,
        "wants a list, not a text",
    );
    refused(
        "security:\n  insecure: 'yes'\n",
        2,
        "wants true or false, not a text",
    );
    refused(
        "reads:\n  session_wait: true\n",
        2,
        "wants a number and its unit, not true or false",
    );
    refused(
        "listen:\n  client: localhost:7400\n",
        2,
        "not an IP address and a port",
    );
    refused("policies:\n  - a\n", 2, "wants keys and values, not a text");
    refused(
        "upstreams:\n  u: 7\n",
        2,
        "`upstreams.u` wants keys and values, not a number",
    );
    refused(
        &policy_with("tags: [a, 7]"),
        8,
        "`policies[].tags[]` wants a text, not a number",
    );
}

#[test]
fn a_bare_number_is_no_time_and_no_size() {
    refused(
        &policy_with("ttl: 60"),
        8,
        "the bare number 60 is not a time: write `60s`",
    );
    refused(&policy_with("soft_timeout: 0"), 8, "write `0s`");
    refused(&policy_with("soft_timeout: '0'"), 8, "write `0s`");
    refused(
        &policy_with("stale_if_error: 1.5"),
        8,
        "the bare number 1.5 is not a time",
    );
    refused(
        &policy_with("max_value_bytes: 1024"),
        8,
        "the bare number 1024 is not a size: write `1024B`",
    );
    refused("storage:\n  max_bytes: 0\n", 2, "bare number 0");
    refused("memory:\n  max_bytes: 1000000\n", 2, "bare number");
    refused("reads:\n\n  session_wait: 100\n", 3, "write `100s`");
    refused(&policy_with("ttl: forever"), 8, "`forever` is not a time");
}

#[test]
fn a_number_out_of_range_is_refused() {
    refused(
        &policy_with("ttl_jitter: 1.1"),
        8,
        "wants a number from 0 to 1, not 1.1",
    );
    refused(&policy_with("ttl_jitter: -0.1"), 8, "from 0 to 1");
    refused(&policy_with("ttl_jitter: .nan"), 8, "");
    refused(
        &policy_with("eager_refresh_threshold: 2"),
        8,
        "from 0 to 1, not 2",
    );
    refused(&policy_with("retry_multiplier: 0.9"), 8, "from 1 to 100");
    refused(
        &policy_with("retry_base: 0s"),
        8,
        "must be from 1ms to 1day",
    );
    refused(
        &policy_with("max_value_bytes: 9MiB"),
        8,
        "from 1 to 8388608 bytes",
    );
    refused(&policy_with("hard_timeout: 6min"), 8, "from 1ms to 5m");
    refused(&policy_with("ttl: 2y"), 8, "from 0s to 1year");
    refused(
        &format!("{UPSTREAM}    fetch_timeout: 301s\n"),
        5,
        "from 1ms to 5m",
    );
    refused(
        &format!("{UPSTREAM}    max_body_bytes: 65MiB\n"),
        5,
        "`upstreams.u.max_body_bytes`",
    );
    refused("cluster:\n  shards: 0\n", 2, "from 1 to 256, not 0");
    refused("cluster:\n  shards: 257\n", 2, "from 1 to 256");
    refused("cluster:\n  expect: 0\n", 2, "from 1 to 64");
    refused("storage:\n  log_keep_entries: -1\n", 2, "not -1");
    assert!(
        Fixture::new(&policy_with("stale_while_revalidate: forever"))
            .load()
            .is_ok()
    );
    assert!(Fixture::new(&policy_with("ttl_jitter: 0")).load().is_ok());
}

#[test]
fn a_name_is_neither_empty_nor_strange() {
    refused("node:\n  name: ''\n", 2, "the name is empty");
    refused("node:\n  name: a b\n", 2, "is no name");
    refused("node:\n  region: ü\n", 2, "is no name");
    refused("node:\n  data_dir: ''\n", 2, "the path is empty");
    refused(
        "upstreams:\n  '': {http: {url: http://h/}}\n",
        2,
        "the name is empty",
    );
    refused("secrets:\n  'a/b': {env: X}\n", 2, "is no name");
}

#[test]
fn a_listener_beyond_loopback_takes_a_word() {
    refused(
        "listen:\n  admin: 192.0.2.1:7402\n",
        2,
        "`listen.admin` 192.0.2.1:7402 is not on loopback",
    );
    refused(
        "listen:\n  client: 0.0.0.0:7400\nadvertise:\n  client: h:7400\n",
        2,
        "is not on loopback",
    );
    let config =
        load("listen: {client: 192.0.2.1:7400, peer: '[::1]:7401'}\nsecurity: {insecure: true}\n");
    assert_eq!(
        (
            config.advertise.client.to_string().as_str(),
            config.advertise.peer.to_string().as_str()
        ),
        ("192.0.2.1:7400", "[::1]:7401")
    );
}

#[test]
fn a_wildcard_needs_an_address_to_advertise() {
    refused(
        "security: {insecure: true}\nlisten:\n  client: 0.0.0.0:7400\n",
        3,
        "`advertise.client` must say where",
    );
    refused(
        "security: {insecure: true}\nlisten:\n  peer: '[::]:7401'\n",
        3,
        "`advertise.peer` must say where",
    );
    refused(
        "advertise:\n  peer: 0.0.0.0:7401\n",
        2,
        "nobody can dial `0.0.0.0:7401`",
    );
    refused(
        "advertise:\n  peer: holdfast-0\n",
        2,
        "`holdfast-0` has no port: write it like `holdfast-0:7401`",
    );
    let fixed = "security: {insecure: true}\nlisten: {client: 0.0.0.0:7400, admin: '[::]:7402'}\nadvertise: {client: h:7400}\n";
    assert_eq!(load(fixed).advertise.client.to_string(), "h:7400");
}

#[test]
fn two_listeners_need_two_ports() {
    refused(
        "listen:\n  client: 127.0.0.1:7401\n",
        2,
        "`listen.peer` and `listen.client` have the same port 7401",
    );
    refused(
        "listen:\n  client: 127.0.0.1:1\n  peer: 127.0.0.1:2\n  admin: 127.0.0.1:2\n",
        4,
        "same port 2",
    );
    load("listen: {client: 127.0.0.1:0, peer: 127.0.0.1:0, admin: 127.0.0.1:0}");
    load("listen: {client: 127.0.0.1:7000, peer: 127.0.0.2:7000}");
}

#[test]
fn a_cluster_says_how_many_and_where() {
    refused(
        "cluster:\n  discover: [a:7401]\n",
        2,
        "needs `cluster.expect`",
    );
    refused("cluster:\n  expect: 3\n", 2, "needs `cluster.discover`");
    refused(
        "cluster:\n  expect: 3\n  discover:\n    - a:7401\n    - b\n",
        5,
        "`b` has no port",
    );
    refused(
        "cluster:\n  expect: 3\n  discover:\n    - a:7401\n    - a:7401\n",
        5,
        "names `a:7401` twice",
    );
    load("cluster: {expect: 3, discover: ['a:7401']}");
}

#[test]
fn a_secret_is_read_or_refused_and_never_shown() {
    refused(
        "secrets:\n  token: hunter2\n",
        2,
        "secret `token` is inline",
    );
    refused("secrets:\n  token: 12345\n", 2, "secret `token` is inline");
    refused("secrets:\n  token:\n", 2, "secret `token` has no source");
    refused("secrets:\n  token: {}\n", 2, "neither `file` nor `env`");
    refused(
        "secrets:\n  token: {file: a, env: B}\n",
        2,
        "both `file` and `env`",
    );
    refused(
        "secrets:\n  token:\n    file: /nonexistent/token\n",
        3,
        "`/nonexistent/token`: No such file",
    );
    refused("secrets:\n  token:\n    file: /\n", 3, "cannot be read");
    refused(
        "secrets:\n  token:\n    env: HOLDFAST_TEST_UNSET\n",
        3,
        "variable `HOLDFAST_TEST_UNSET` is not set",
    );
    refused("secrets:\n  token: {file: /dev/null}\n", 2, "it is empty");
    let broken = Fixture::new("secrets: {token: {env: TOKEN}}\n")
        .variable("TOKEN", "hunter2\nx")
        .complaints();
    assert!(
        broken.contains("it has a line break") && !broken.contains("hunter2"),
        "{broken}"
    );
    refused("secrets:\n  token: {file: /dev/zero}\n", 2, "over 64 KiB");
    for yaml in [
        "secrets:\n  token: hunter2\n",
        "secrets:\n  token: [hunter2]\n",
        "secrets:\n  token: {file: {hunter2: x}}\n",
        "secrets: hunter2\n",
    ] {
        let complaints = Fixture::new(yaml).complaints();
        assert!(!complaints.contains("hunter2"), "{complaints}");
    }
    let set = Fixture::new("secrets: {token: {env: TOKEN}}\n")
        .variable("TOKEN", "hunter2\n")
        .loaded();
    assert_eq!(set.secrets.get("token").unwrap().expose(), "hunter2");
    assert!(!format!("{set:?}").contains("hunter2"));
}

#[test]
fn an_undeclared_secret_is_refused() {
    refused(
        &format!("{UPSTREAM}      headers:\n        a: x\n        b: '${{secret:token}}'\n"),
        7,
        "secret `token` is not declared",
    );
    // One that is declared and cannot be read is one mistake, not two.
    let both = format!(
        "{UPSTREAM}      headers:\n        b: '${{secret:token}}'\nsecrets:\n  token: {{file: /nonexistent}}\n"
    );
    refused(&both, 8, "cannot be read");
}

#[test]
fn an_upstream_says_what_and_where_it_is() {
    refused("upstreams:\n  u: {}\n", 2, "upstream `u` has no kind");
    refused(
        "upstreams:\n  u:\n    grpc: {}\n    http: {url: http://h/}\n",
        3,
        "`grpc` in `upstreams.u` is not built yet",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      select: [a]\n",
        3,
        "upstream `u` has no `url`",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: ftp://h/\n",
        4,
        "http",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: '{1}://h/'\n",
        4,
        "`upstreams.u.http.url`",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: http://{1}/\n",
        4,
        "`{1}` outside",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: http://h:{1}/\n",
        4,
        "`{1}` outside",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: http://h/{one}\n",
        4,
        "`{one}` is no placeholder",
    );
    refused(
        "upstreams:\n  u:\n    http:\n      url: http://h/${secret:x}\n",
        4,
        "no placeholder",
    );
    refused(
        &format!("{UPSTREAM}      headers: {{'a b': x}}\n"),
        5,
        "`a b` is no header name",
    );
    refused(
        &format!("{UPSTREAM}      headers:\n        X-A: x\n        x-a: y\n"),
        7,
        "header `x-a` is here twice",
    );
    refused(
        &format!("{UPSTREAM}      headers:\n        x-a: '{{1'\n"),
        6,
        "without its",
    );
    refused(
        &format!("{UPSTREAM}      select: [a, a]\n"),
        5,
        "field `a` twice",
    );
    let inline =
        Fixture::new("upstreams:\n  u:\n    http:\n      url: http://me:hunter2@h/\n").complaints();
    assert!(
        inline.starts_with("holdfastd.yaml:4: ") && !inline.contains("hunter2"),
        "{inline}"
    );
}

#[test]
fn a_policy_has_a_pattern_and_a_declared_upstream() {
    refused(
        &format!("{UPSTREAM}policies:\n  - match: 'a[b'\n    upstream: u\n"),
        6,
        "a `[` without its `]`",
    );
    refused(
        &format!("{UPSTREAM}policies:\n  - match: ''\n    upstream: u\n"),
        6,
        "the pattern is empty",
    );
    refused(
        &format!("{UPSTREAM}policies:\n  - upstream: u\n"),
        6,
        "a policy has no `match`",
    );
    refused(
        &format!("{UPSTREAM}policies:\n  - match: a/*\n"),
        6,
        "a policy has no `upstream`",
    );
    refused(
        &format!("{UPSTREAM}policies:\n  - match: a/*\n    upstream: v\n"),
        7,
        "no upstream `v`: declared are `u`",
    );
    refused(
        "policies:\n  - match: a/*\n    upstream: v\n",
        3,
        "no upstream is declared",
    );
}

#[test]
fn a_capture_needs_its_star() {
    let two = UPSTREAM.replace("{1}", "{1}/{2}");
    let complaint = "url: `{2}` is not captured: `a/*` has 1 `*`";
    refused(
        &format!("{two}policies:\n  - match: a/*\n    upstream: u\n"),
        6,
        complaint,
    );
    // Per policy: the second one is right.
    refused(
        &format!(
            "{two}policies:\n  - {{match: a/*, upstream: u}}\n  - {{match: b/*/*, upstream: u}}\n"
        ),
        6,
        complaint,
    );
    refused(
        &format!(
            "{UPSTREAM}      headers: {{x-a: '{{2}}'}}\npolicies:\n  - match: a/*\n    upstream: u\n"
        ),
        7,
        "header `x-a`: `{2}` is not captured",
    );
    refused(
        &policy_with("tags:\n      - 'a:{1}'\n      - 'a:{2}'"),
        10,
        "tag `a:{2}`: `{2}` is not captured: `a/*` has 1 `*`",
    );
    refused(&policy_with("tags: ['{9}']"), 8, "`{9}` is not captured");
    refused(
        &format!("{UPSTREAM}policies:\n  - match: 'a/\\*'\n    upstream: u\n"),
        6,
        "has 0 `*`",
    );
}

#[test]
fn a_tag_is_a_template_without_secrets() {
    refused(&policy_with("tags: ['{x}']"), 8, "`{x}` is no placeholder");
    refused(&policy_with("tags: ['']"), 8, "it is empty");
    refused(
        &policy_with("tags: ['${secret:token}']"),
        8,
        "a secret cannot be in a tag",
    );
    let many = vec!["a"; 65].join(", ");
    refused(
        &policy_with(&format!("tags: [{many}]")),
        8,
        "more than 64 tags",
    );
}

#[test]
fn several_mistakes_are_shown_in_the_order_of_their_lines() {
    let yaml =
        "node:\n  role: king\nlisten:\n  client: here\nreads:\n  session_wait: 5\ncolour: red\n";
    let complaints = Fixture::new(yaml).complaints();
    let lines: Vec<&str> = complaints
        .lines()
        .map(|line| line.split(": ").next().unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            "holdfastd.yaml:2",
            "holdfastd.yaml:4",
            "holdfastd.yaml:6",
            "holdfastd.yaml:7"
        ]
    );
}

#[test]
fn a_data_directory_is_made_for_its_owner_or_refused_by_its_line() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new("");
    let data = fixture.directory.path().join("some/data");
    std::fs::write(
        fixture.file(),
        format!("node:\n  name: a\n  data_dir: {}\n", data.display()),
    )
    .unwrap();
    let config = fixture.loaded();
    config.check_data_dir().unwrap();
    assert_eq!(
        std::fs::metadata(&data).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0);
    config.check_data_dir().unwrap();

    std::fs::remove_dir(&data).unwrap();
    std::fs::write(&data, "a file in its place").unwrap();
    let error = config.check_data_dir().unwrap_err().to_string();
    assert!(
        error.starts_with(&format!(
            "{}:3: data directory `{}` cannot be made",
            fixture.file().display(),
            data.display()
        )),
        "{error}"
    );
}
