//! Variables as people write them, and addresses as they are.

use std::os::unix::ffi::OsStringExt;

use super::refusals::refused;
use super::*;

#[test]
fn an_ipv6_address_is_one_in_a_variable_and_in_quotes_in_a_file() {
    let fixture = Fixture::new("listen: {peer: \"[::1]:7501\"}\n")
        .variable("HOLDFAST__LISTEN__CLIENT", "[::1]:7500")
        .variable("HOLDFAST__LISTEN__ADMIN", "\"[::1]:7502\"")
        .variable("HOLDFAST__CLUSTER__EXPECT", "2")
        .variable("HOLDFAST__CLUSTER__DISCOVER", "[::1]:7501,[::2]:7501");
    let config = fixture.loaded();
    let listen = &config.listen;
    assert_eq!(
        [listen.client, listen.peer, listen.admin].map(|address| address.to_string()),
        ["[::1]:7500", "[::1]:7501", "[::1]:7502"]
    );
    let discover = config.cluster.discover.iter().map(Address::to_string);
    assert_eq!(discover.collect::<Vec<_>>(), ["[::1]:7501", "[::2]:7501"]);

    for (yaml, line) in [
        (
            "reads: {}\nlisten:\n  client: [::1]:7400\n  peer: 127.0.0.1:1\n",
            3,
        ),
        ("listen: {client: [::1]:7400, peer: '[::1]:7401'}\n", 1),
        ("cluster:\n  discover:\n    - [::1]:7401\n    - a:7401\n", 3),
    ] {
        refused(yaml, line, "put it in quotes, as `\"[::1]:740");
    }
}

#[test]
fn a_variable_is_the_text_that_was_written_where_a_text_is_wanted() {
    for name in ["12", "1e3", "007", "true", "-1.50"] {
        let fixture = Fixture::new("").variable("HOLDFAST__NODE__NAME", name);
        assert_eq!(fixture.loaded().node.name, name);
    }
    // In a file the quotes are easily added, and a number where a name was meant is a slip.
    refused("node:\n  name: 12\n", 2, "put it in quotes");
    let inside = Fixture::new("").variable("HOLDFAST__NODE", "{name: 12}");
    assert!(inside.complaints().contains("put it in quotes"));
}

#[test]
fn a_variable_lists_with_commas() {
    let discovered = |text: &str| {
        let fixture =
            Fixture::new("cluster: {expect: 2}\n").variable("HOLDFAST__CLUSTER__DISCOVER", text);
        let discover = fixture.loaded().cluster.discover;
        discover.iter().map(Address::to_string).collect::<Vec<_>>()
    };
    assert_eq!(discovered("a:1,b:1"), ["a:1", "b:1"]);
    assert_eq!(discovered("a:1, b:1"), ["a:1", "b:1"]);
    assert_eq!(discovered("a:1"), ["a:1"]);
    assert_eq!(discovered("[a:1, 'b:1']"), ["a:1", "b:1"]);
    refused(
        "cluster:\n  discover: a:1,b:1\n",
        2,
        "wants a list, not a text",
    );
}

#[test]
fn a_header_is_named_by_a_variable_as_servers_know_it() {
    let yaml = format!("{UPSTREAM}      headers: {{x-request-id: a}}\n");
    let fixture = Fixture::new(&yaml)
        .variable("HOLDFAST__UPSTREAMS__U__HTTP__HEADERS__X_API_KEY", "12")
        .variable("HOLDFAST__UPSTREAMS__U__HTTP__HEADERS__X_REQUEST_ID", "b");
    let config = fixture.loaded();
    let mut headers: Vec<(&str, &str)> = http(&config)
        .headers
        .iter()
        .map(|(name, text)| (name.as_str(), text.literal().unwrap()))
        .collect();
    headers.sort_unstable();
    assert_eq!(headers, [("x-api-key", "12"), ("x-request-id", "b")]);
}

#[test]
fn a_variable_that_is_no_text_is_refused_and_one_that_is_not_ours_is_not_read() {
    let broken = || OsString::from_vec(b"a\xff".to_vec());
    let mut fixture = Fixture::new("");
    fixture.environment = vec![("HOLDFAST__NODE__NAME".into(), broken())];
    assert_eq!(fixture.complaints(), "HOLDFAST__NODE__NAME: is not UTF-8");
    fixture.environment = vec![(
        OsString::from_vec(b"HOLDFAST__NODE__\xff".to_vec()),
        "a".into(),
    )];
    assert!(fixture.complaints().contains("unknown key"));
    fixture.environment = vec![("OTHER".into(), broken())];
    fixture.loaded();
    let mut fixture = Fixture::new("secrets:\n  token: {env: OTHER}\n");
    fixture.environment = vec![("OTHER".into(), broken())];
    assert!(
        fixture
            .complaints()
            .contains("variable `OTHER` is not UTF-8")
    );
}

#[test]
fn top_level_keys_of_the_users_own_hold_anchors() {
    let yaml = format!(
        "x-times: &times {{ttl: 5s, soft_timeout: 1s}}\n{UPSTREAM}policies:\n  - {{<<: *times, match: 'a/*', upstream: u}}\n"
    );
    let config = load(&yaml);
    let policy = config.policies.find(b"a/b").unwrap().policy;
    assert_eq!(policy.ttl, Duration::from_secs(5));
    refused("node: {x-a: 1}\n", 1, "unknown key `x-a`");
}
