//! A configuration as its user meets it.

mod contradictions;
mod refusals;
mod variables;

use std::ffi::OsString;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::policy::Window;
use crate::upstream::http::HttpSpec;

/// A directory with a configuration file in it.
struct Fixture {
    directory: TempDir,
    environment: Vec<(OsString, OsString)>,
    overrides: Overrides,
}

impl Fixture {
    fn new(yaml: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("holdfastd.yaml"), yaml).unwrap();
        Self {
            directory,
            environment: Vec::new(),
            overrides: Overrides::default(),
        }
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn overrides(mut self, overrides: Overrides) -> Self {
        self.overrides = overrides;
        self
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("holdfastd.yaml")
    }

    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(
            Some(&self.file()),
            self.environment.clone(),
            &self.overrides,
        )
    }

    fn loaded(&self) -> Config {
        self.load().unwrap_or_else(|error| panic!("{error}"))
    }

    /// What `load` complains about, without the directory's name.
    fn complaints(&self) -> String {
        let directory = format!("{}/", self.directory.path().display());
        self.load()
            .expect_err("it has a mistake")
            .to_string()
            .replace(&directory, "")
    }
}

fn load(yaml: &str) -> Config {
    Fixture::new(yaml).loaded()
}

/// The same without what depends on where it was loaded from.
fn without_places(config: &Config) -> String {
    let Config {
        node,
        listen,
        advertise,
        cluster,
        secrets,
        upstreams,
        policies,
        storage,
        memory,
        reads,
        security,
        places: _,
    } = config;
    format!(
        "{node:?} {listen:?} {advertise:?} {cluster:?} {secrets:?} {upstreams:?} {policies:?} {storage:?} {memory:?} {reads:?} {security:?}"
    )
}

fn http(config: &Config) -> &HttpSpec {
    let Spec::Http(http) = &config.upstreams[0].spec;
    http
}

const UPSTREAM: &str = "upstreams:\n  u:\n    http:\n      url: http://h/{1}\n";

fn policy_with(line: &str) -> String {
    format!("{UPSTREAM}policies:\n  - match: a/*\n    upstream: u\n    {line}\n")
}

#[test]
fn nothing_said_is_the_defaults() {
    let config = Config::load(None, [], &Overrides::default()).unwrap();
    assert_eq!(config.node.name, hostname::get().unwrap().to_string_lossy());
    assert_eq!(
        (config.node.region.as_str(), config.node.role),
        ("", Role::Voter)
    );
    assert_eq!(config.node.data_dir, PathBuf::from("./holdfast-data"));
    assert_eq!(config.listen.client, "127.0.0.1:7400".parse().unwrap());
    assert_eq!(config.advertise.peer, "127.0.0.1:7401".parse().unwrap());
    assert_eq!(
        config.cluster,
        Cluster {
            expect: 1,
            discover: vec![],
            shards: 1
        }
    );
    assert_eq!(
        config.storage,
        Storage {
            engine: Engine::Rocksdb,
            max_bytes: None,
            log_keep_entries: 100_000,
            log_keep_bytes: 512 << 20
        }
    );
    assert_eq!(
        (config.memory.max_bytes, config.reads.session_wait),
        (None, Duration::from_millis(100))
    );
    assert!(!config.security.insecure && config.upstreams.is_empty());
}

#[test]
fn the_documented_configuration_is_the_defaults() {
    let none = Config::load(None, [], &Overrides::default()).unwrap();
    assert_eq!(without_places(&load(DEFAULT_YAML)), without_places(&none));
    for empty in ["", "# nothing\n", "node:\nlisten: {}\npolicies:\n"] {
        assert_eq!(
            without_places(&load(empty)),
            without_places(&none),
            "{empty:?}"
        );
    }
}

/// The default configuration with its examples made real.
fn uncommented() -> Fixture {
    let yaml: String = DEFAULT_YAML
        .lines()
        .map(|line| {
            let indent = &line[..line.len() - line.trim_start().len()];
            match line.trim_start().strip_prefix("# ") {
                Some(rest) => format!("{indent}{rest}\n"),
                None => format!("{line}\n"),
            }
        })
        .collect();
    let fixture = Fixture::new("");
    let secret = fixture.directory.path().join("token");
    std::fs::write(&secret, "hunter2\n").unwrap();
    std::fs::write(
        fixture.file(),
        yaml.replace("/run/secrets/profiles", secret.to_str().unwrap()),
    )
    .unwrap();
    fixture.variable("ORDERS_TOKEN", "hunter3")
}

#[test]
fn the_documented_examples_load_and_show_the_defaults() {
    let config = uncommented().loaded();
    assert_eq!(
        (
            config.node.name.as_str(),
            config.advertise.peer.to_string().as_str()
        ),
        ("holdfast-0", "holdfast-0.holdfast:7401")
    );
    assert_eq!(
        config.secrets.get("profiles_token").unwrap().expose(),
        "hunter2"
    );
    assert_eq!(
        config.secrets.get("orders_token").unwrap().expose(),
        "hunter3"
    );
    assert_eq!(
        (config.storage.max_bytes, config.memory.max_bytes),
        (Some(100 << 30), Some(4 << 30))
    );
    assert_eq!(http(&config).select, ["name", "plan"]);
    let shown = config.policies.find(b"user/7/profile").unwrap();
    assert_eq!(shown.captures.get(1), Some(b"7".as_slice()));

    // The policy of two lines has the same values as the one that says all of them.
    let bare = load(
        "upstreams: {profiles: {http: {url: 'http://h/'}}}\npolicies:\n- {match: user/*/profile, upstream: profiles, tags: ['user:{1}']}\n",
    );
    assert_eq!(
        format!("{:?}", bare.policies),
        format!("{:?}", config.policies)
    );
    assert_eq!(http(&bare).fetch_timeout, http(&config).fetch_timeout);
    assert_eq!(http(&bare).max_body_bytes, http(&config).max_body_bytes);
    assert_eq!(http(&bare).connect_timeout, http(&config).connect_timeout);
    assert_eq!(http(&bare).accept_status, http(&config).accept_status);
    assert_eq!(http(&bare).unframed, http(&config).unframed);
}

#[test]
fn every_key_is_documented() {
    use super::policies::POLICY;
    use super::sections::*;
    use super::upstreams::{HTTP, SECRET, TLS, UPSTREAM};
    let sections = [
        TOP, NODE, LISTEN, ADVERTISE, CLUSTER, STORAGE, MEMORY, READS, SECURITY, SECRET, UPSTREAM,
        HTTP, TLS, POLICY,
    ];
    for key in sections.iter().flat_map(|keys| keys.built) {
        let documented = DEFAULT_YAML.lines().any(|line| {
            let setting = line.trim_start_matches(['#', ' ', '-']);
            setting
                .strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(':'))
        });
        assert!(documented, "`{key}` is not in deploy/holdfastd.yaml");
    }
    for key in sections.iter().flat_map(|keys| keys.not_built) {
        assert!(
            !sections
                .iter()
                .any(|keys| keys.built.contains(key) && keys.not_built.contains(key)),
            "`{key}` is built and not built"
        );
    }
}

#[test]
fn the_example_of_the_design_loads() {
    let fixture = Fixture::new("");
    let secret = fixture.directory.path().join("profiles");
    std::fs::write(&secret, "s3cret\r\n").unwrap();
    let yaml = format!(
        r#"
node:      {{name: holdfast-0, region: eu-west, role: voter, data_dir: /var/lib/holdfast}}
listen:    {{client: "0.0.0.0:7400", peer: "0.0.0.0:7401", admin: "0.0.0.0:7402"}}
advertise: {{client: "holdfast-0.holdfast:7400", peer: "holdfast-0.holdfast:7401"}}
cluster:   {{expect: 3, discover: ["holdfast-0.holdfast:7401", "holdfast-1.holdfast:7401", "holdfast-2.holdfast:7401"], shards: 1}}
secrets:   {{profiles_token: {{file: {}}}}}
upstreams:
  profiles:
    http: {{url: "https://api.example.com/users/{{1}}", headers: {{authorization: "Bearer ${{secret:profiles_token}}"}}, select: [name, plan]}}
policies:
  - {{match: "user/*/profile", upstream: profiles, ttl: 60s, stale_if_error: forever, tags: ["user:{{1}}"]}}
security: {{insecure: true}}
"#,
        secret.display()
    );
    std::fs::write(fixture.file(), yaml).unwrap();
    let config = fixture.loaded();
    assert_eq!(
        (config.cluster.expect, config.cluster.discover.len()),
        (3, 3)
    );
    let matched = config.policies.find(b"user/7/profile").unwrap();
    assert_eq!(matched.policy.stale_if_error, Window::Forever);
    let header = http(&config).headers[0]
        .1
        .fill(b"", &[], &config.secrets)
        .unwrap();
    assert_eq!(header, "Bearer s3cret");
    assert!(!format!("{config:?}").contains("s3cret"));
}

#[test]
fn each_layer_goes_over_the_one_before() {
    let yaml = "node: {name: from-file, region: from-file, role: learner}\ncluster: {expect: 2, discover: [a:1, b:1]}\n";
    let fixture = Fixture::new(yaml)
        .variable("HOLDFAST__NODE__NAME", "from-variable")
        .variable("HOLDFAST__NODE__REGION", "from-variable")
        .variable("HOLDFAST__CLUSTER", "{expect: 3, discover: ['c:1']}")
        .variable("HOLDFAST__STORAGE__MAX_BYTES", "1GiB")
        .variable("HOLDFAST_PORT", "tcp://10.0.0.1:7400")
        .variable("HOLDFAST_ENDPOINTS", "x")
        .overrides(Overrides::default().text("--name", "node.name", "007"));
    let config = fixture.loaded();
    assert_eq!(
        (
            config.node.name.as_str(),
            config.node.region.as_str(),
            config.node.role
        ),
        ("007", "from-variable", Role::Learner)
    );
    assert_eq!(
        (
            config.cluster.expect,
            config.cluster.discover[0].to_string().as_str()
        ),
        (3, "c:1")
    );
    assert_eq!(config.storage.max_bytes, Some(1 << 30));
    assert_eq!(config.places.name, Place::Flag("--name".into()));
}

#[test]
fn variables_reach_names_in_any_case_and_flags_prepend_policies() {
    let fixture = Fixture::new(
        &format!("{UPSTREAM}policies: [{{match: '*', upstream: u}}]\n")
            .replace("u:\n", "Slow:\n")
            .replace("upstream: u", "upstream: Slow"),
    )
    .variable("HOLDFAST__UPSTREAMS__SLOW__FETCH_TIMEOUT", "9s")
    .overrides(
        Overrides::default()
            .yaml(
                "--upstream",
                "upstreams.demo",
                r#"{"http": {"url": "http://127.0.0.1:8000/users/{1}"}}"#,
            )
            .prepend(
                "--upstream",
                "policies",
                r#"[{"match": "user/*", "upstream": "demo", "ttl": "2s"}]"#,
            ),
    );
    let config = fixture.loaded();
    assert_eq!(http(&config).fetch_timeout, Duration::from_secs(9));
    assert_eq!(
        &*config.policies.find(b"user/1").unwrap().policy.upstream,
        "demo"
    );
    assert_eq!(
        &*config.policies.find(b"other").unwrap().policy.upstream,
        "Slow"
    );
}

#[test]
fn a_retry_starts_with_a_share_of_the_ttl() {
    let base = |ttl: &str| {
        let config = load(&policy_with(&format!("ttl: {ttl}")));
        config.policies.find(b"a/b").unwrap().policy.retry_base
    };
    assert_eq!(base("60s"), Duration::from_secs(3));
    assert_eq!(base("2s"), Duration::from_secs(1));
}

#[test]
fn the_unit_starts_what_is_documented() {
    let unit = include_str!("../../../../deploy/holdfastd.service");
    for line in [
        "Type=exec",
        "KillSignal=SIGTERM",
        "TimeoutStopSec=15",
        "Restart=on-failure",
        "RestartPreventExitStatus=2",
        "StateDirectory=holdfast",
    ] {
        assert!(unit.lines().any(|own| own == line), "{line}");
    }
    let variable = unit
        .lines()
        .find_map(|line| line.strip_prefix("Environment="))
        .unwrap();
    let (name, value) = variable.split_once('=').unwrap();
    assert_eq!(
        Fixture::new("")
            .variable(name, value)
            .loaded()
            .node
            .data_dir,
        PathBuf::from("/var/lib/holdfast")
    );
}
