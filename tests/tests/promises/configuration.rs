//! What is wrong with a configuration is said with file, line and reason, before any port opens.

use std::{
    fmt::Write as _,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
#[cfg(feature = "rocksdb")]
use std::{net::TcpStream, time::Duration};

use holdfast_client::Client;
use holdfast_tests::cluster::{http_get, until};
use tracing::info;

use crate::PROGRAMS;
#[cfg(feature = "rocksdb")]
use crate::processes;

const MISCONFIGURED: Option<i32> = Some(2);

/// A file of its own, and ports that somebody else listens on: whoever takes them first says so,
/// with another exit code.
struct Fixture {
    dir: tempfile::TempDir,
    held: Vec<TcpListener>,
}

impl Fixture {
    fn new() -> anyhow::Result<Self> {
        let held = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            dir: tempfile::tempdir()?,
            held,
        })
    }

    fn ports(&self) -> anyhow::Result<Vec<SocketAddr>> {
        Ok(self
            .held
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?)
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("holdfastd.yaml")
    }

    fn write(&self, yaml: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.file(), yaml)?)
    }

    /// `yaml` with `listen` and `node.data_dir` behind it, where they move no line.
    fn with_places(&self, yaml: &str) -> anyhow::Result<String> {
        let ports = self.ports()?;
        let mut yaml = yaml.to_owned();
        if !yaml.contains("listen:") {
            writeln!(
                yaml,
                "listen: {{client: \"{}\", peer: \"{}\", admin: \"{}\"}}",
                ports[0], ports[1], ports[2]
            )?;
        }
        if !yaml.contains("node:") {
            writeln!(
                yaml,
                "node: {{name: a, data_dir: \"{}\"}}",
                self.dir.path().join("data").display()
            )?;
        }
        Ok(yaml)
    }
}

fn holdfastd(dir: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(PROGRAMS.holdfastd);
    for (name, _) in std::env::vars()
        .filter(|(name, _)| name.starts_with("HOLDFAST") || name.starts_with("OTEL"))
    {
        command.env_remove(name);
    }
    command
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(dir)
        .stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Exit 2 and `file:line: reason`, by `check-config` and by a start, which takes no port and makes
/// no directory.
fn refused(yaml: &str, line: usize, reason: &str) -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(&fixture.with_places(yaml)?)?;
    let file = fixture.file();
    let file = file.to_string_lossy();
    for arguments in [["check-config", &*file], ["--config", &*file]] {
        let ended = holdfastd(fixture.dir.path(), &arguments, &[]).output()?;
        let said = said(&ended);
        assert_eq!(ended.status.code(), MISCONFIGURED, "{yaml}\n{said}");
        let expected = format!("{file}:{line}: ");
        assert!(
            said.lines()
                .any(|said| said.starts_with(&expected) && said.contains(reason)),
            "{yaml}\n{said}"
        );
        assert!(!said.contains("hunter2"), "{said}");
        assert!(ended.stdout.is_empty());
    }
    let made: Vec<_> = std::fs::read_dir(fixture.dir.path())?
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .collect();
    assert_eq!(made, ["holdfastd.yaml"], "nothing was made");
    Ok(())
}

const UPSTREAM: &str = "upstreams:\n  u:\n    http: {url: \"http://h/{1}\"}\n";

#[test]
fn a_wrong_configuration_ends_with_2_its_line_and_its_reason() -> anyhow::Result<()> {
    refused(
        "reads:\n  colour: red\n",
        2,
        "unknown key `colour` in `reads`",
    )?;
    refused(
        "security:\n  tls: {}\n",
        2,
        "`tls` in `security` is not built yet",
    )?;
    refused(
        &format!("{UPSTREAM}policies:\n  - match: 'a[b'\n    upstream: u\n"),
        5,
        "`[` without its `]`",
    )?;
    refused(
        &format!("{UPSTREAM}policies:\n  - match: a/*\n    upstream: v\n"),
        6,
        "no upstream `v`",
    )?;
    refused(
        "policies:\n  - match: a/*\n    upstream: v\n",
        3,
        "no upstream is declared",
    )?;

    refused(
        "secrets:\n  token:\n    file: /nonexistent/token\n",
        3,
        "`/nonexistent/token`: No such file",
    )?;
    refused(
        "secrets:\n  token:\n    env: NO_SUCH_VARIABLE\n",
        3,
        "`NO_SUCH_VARIABLE` is not set",
    )?;
    refused(
        "secrets:\n  token: hunter2\n",
        2,
        "secret `token` is inline",
    )?;
    let undeclared = "upstreams:\n  u:\n    http:\n      url: http://h/\n      headers: {authorization: \"Bearer ${secret:token}\"}\n";
    refused(undeclared, 5, "secret `token` is not declared")?;

    let two = UPSTREAM.replace("{1}", "{1}/{2}");
    refused(
        &format!("{two}policies:\n  - match: a/*\n    upstream: u\n"),
        5,
        "`{2}` is not captured",
    )?;
    refused(
        &format!("{UPSTREAM}policies:\n  - {{match: 'a/*', upstream: u, ttl: 60}}\n"),
        5,
        "write `60s`",
    )?;
    refused(
        "reads:\n  session_wait: 5\n",
        2,
        "the bare number 5 is not a time",
    )?;
    refused("storage:\n  max_bytes: 1000000\n", 2, "is not a size")?;

    refused(
        "security: {insecure: true}\nlisten:\n  client: 0.0.0.0:0\n",
        3,
        "`advertise.client` must say where",
    )?;
    refused(
        "security: {insecure: true}\nlisten:\n  peer: '[::]:0'\n",
        3,
        "`advertise.peer` must say where",
    )?;
    refused(
        "listen:\n  client: 192.0.2.1:7400\n",
        2,
        "is not on loopback",
    )?;
    refused("listen:\n  admin: 0.0.0.0:7402\n", 2, "is not on loopback")?;
    refused("cluster:\n  expect: 3\n", 2, "needs `cluster.discover`")?;
    refused("reads:\n  session_wait: [5s\n", 3, "not valid YAML")?;
    Ok(())
}

#[test]
fn every_mistake_is_shown_at_once() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    fixture.write(
        "node:\n  role: king\nlisten:\n  client: here\nreads:\n  session_wait: 5\ncolour: red\n",
    )?;
    let ended = holdfastd(fixture.dir.path(), &["check-config", "holdfastd.yaml"], &[]).output()?;
    let said = said(&ended);
    let places: Vec<&str> = said
        .lines()
        .filter_map(|line| line.split(": ").next())
        .collect();
    assert_eq!(
        places,
        [
            "holdfastd.yaml:2",
            "holdfastd.yaml:4",
            "holdfastd.yaml:6",
            "holdfastd.yaml:7"
        ],
        "{said}"
    );

    fixture.write("reads: {session_wait: 5s}\n")?;
    let ended = holdfastd(fixture.dir.path(), &["check-config", "holdfastd.yaml"], &[]).output()?;
    assert_eq!(
        (ended.status.code(), ended.stdout.as_slice()),
        (Some(0), b"holdfastd.yaml: ok\n".as_slice()),
        "{}",
        self::said(&ended)
    );
    Ok(())
}

#[test]
fn a_data_directory_that_cannot_be_is_refused_before_a_port_is_taken() -> anyhow::Result<()> {
    let fixture = Fixture::new()?;
    let ports = fixture.ports()?;
    let listen = format!(
        "listen: {{client: \"{}\", peer: \"{}\", admin: \"{}\"}}\n",
        ports[0], ports[1], ports[2]
    );
    let refused = |data_dir: &str, reason: &str| -> anyhow::Result<()> {
        fixture.write(&format!(
            "node:\n  name: a\n  data_dir: \"{data_dir}\"\n{listen}"
        ))?;
        let ended = holdfastd(fixture.dir.path(), &["--config", "holdfastd.yaml"], &[]).output()?;
        let said = said(&ended);
        assert_eq!(ended.status.code(), MISCONFIGURED, "{said}");
        assert!(
            said.contains("holdfastd.yaml:3: data directory") && said.contains(reason),
            "{said}"
        );
        Ok(())
    };
    std::fs::write(fixture.dir.path().join("file"), "in its place")?;
    refused("file", "File exists")?;
    refused("file/below", "Not a directory")?;
    refused("/proc/no/such", "cannot be made")?;

    info!("--- the ports were held all the time: a right configuration says that");
    fixture.write(&format!("node:\n  name: a\n  data_dir: data\n{listen}"))?;
    let ended = holdfastd(fixture.dir.path(), &["--config", "holdfastd.yaml"], &[]).output()?;
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        said(&ended).contains(&format!("cannot listen for clients on {}", ports[0])),
        "{}",
        said(&ended)
    );
    Ok(())
}

/// The directory of another node, and one that another process has open: said before anybody gets
/// through.
#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_of_another_node_is_refused_before_a_port_opens() -> anyhow::Result<()> {
    let mut cluster = processes().nodes(1, 1).start().await?;
    let client = cluster.client(0);
    client.set("k", "kept").await?;
    let addresses = cluster.addresses(0);
    let written = std::fs::read_to_string(cluster.config_file(0))?;

    info!("--- in use");
    let ports: Vec<SocketAddr> = {
        let free: Vec<TcpListener> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        free.iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?
    };
    let mut second = written.clone();
    for (old, new) in [addresses.client, addresses.peer, addresses.admin]
        .iter()
        .zip(&ports)
    {
        second = second.replace(&old.to_string(), &new.to_string());
    }
    let dir = cluster.dir().to_owned();
    let refused = |yaml: &str, reason: &str| -> anyhow::Result<()> {
        std::fs::write(dir.join("second.yaml"), yaml)?;
        let mut child = holdfastd(&dir, &["--config", "second.yaml"], &[])
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        // From its start to its end nobody gets through.
        let mut dials = 0;
        while child.try_wait()?.is_none() {
            for port in &ports {
                assert!(
                    TcpStream::connect_timeout(port, Duration::from_millis(100)).is_err(),
                    "a port is open"
                );
                dials += 1;
            }
        }
        let ended = child.wait_with_output()?;
        let said = said(&ended);
        assert_eq!(ended.status.code(), MISCONFIGURED, "{said}");
        assert!(
            said.contains("second.yaml:1: ")
                && said.contains(reason)
                && !said.contains("listening"),
            "{said}"
        );
        assert!(dials > 0);
        Ok(())
    };
    refused(&second, "is in use by another process")?;

    info!("--- of another name");
    cluster.stop_node(0).await?;
    refused(
        &second.replace("name: node-1", "name: other"),
        "belongs to node `node-1`, this is `other`",
    )?;

    info!("--- what is in it is still its owner's");
    cluster.start_node(0).await?;
    cluster.ready(0).await?;
    let answer = cluster.client(0).get("k").await?;
    assert_eq!(answer.answer.value.as_deref(), Some(b"kept".as_slice()));
    Ok(())
}

#[test]
fn the_default_configuration_is_the_one_that_is_documented() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let printed = holdfastd(dir.path(), &["default-config"], &[]).output()?;
    assert_eq!(printed.status.code(), Some(0));
    // Tests run in their package, whichever checkout they were built in.
    let documented = std::fs::read("../deploy/holdfastd.yaml")?;
    assert_eq!(
        String::from_utf8_lossy(&printed.stdout),
        String::from_utf8_lossy(&documented)
    );

    info!("--- it can be used as it is");
    std::fs::write(dir.path().join("f.yaml"), &printed.stdout)?;
    let checked = holdfastd(dir.path(), &["check-config", "f.yaml"], &[]).output()?;
    assert_eq!(checked.status.code(), Some(0), "{}", said(&checked));

    info!("--- and with every example taken at its word");
    let examples: String = String::from_utf8(printed.stdout)?
        .lines()
        .map(|line| {
            match line.strip_prefix("# ").or_else(|| {
                line.trim_start()
                    .strip_prefix("# ")
                    .filter(|_| line.starts_with("  # "))
            }) {
                Some(example) if line.starts_with("# ") => format!("{example}\n"),
                Some(example) => format!("  {example}\n"),
                None => format!("{line}\n"),
            }
        })
        .collect();
    std::fs::write(dir.path().join("secret"), "s")?;
    let examples = examples.replace(
        "/run/secrets/profiles",
        &dir.path().join("secret").to_string_lossy(),
    );
    std::fs::write(dir.path().join("examples.yaml"), &examples)?;
    let checked = holdfastd(
        dir.path(),
        &["check-config", "examples.yaml"],
        &[("ORDERS_TOKEN", "t")],
    )
    .output()?;
    assert_eq!(
        checked.status.code(),
        Some(0),
        "{}\n{examples}",
        said(&checked)
    );
    Ok(())
}

/// Killed with the test.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Only `HOLDFAST__*` configures: a Kubernetes service of our name sets `HOLDFAST_PORT`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn variables_go_over_the_file_and_flags_over_them() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let ports: Vec<SocketAddr> = {
        let free: Vec<TcpListener> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        free.iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?
    };
    let (client, peer, admin) = (
        ports[0].to_string(),
        ports[1].to_string(),
        ports[2].to_string(),
    );
    std::fs::write(
        dir.path().join("f.yaml"),
        "node: {name: of-the-file, region: of-the-file, data_dir: data}\n",
    )?;
    let variables = [
        ("HOLDFAST_PORT", "tcp://10.0.0.1:7400"),
        ("HOLDFAST_SERVICE_HOST", "10.0.0.1"),
        ("HOLDFAST__NODE__NAME", "of-the-variable"),
        ("HOLDFAST__NODE__REGION", "of-the-variable"),
        ("HOLDFAST__LISTEN__CLIENT", "127.0.0.1:1"),
        ("HOLDFAST__LISTEN__PEER", &peer),
        ("HOLDFAST__LISTEN__ADMIN", &admin),
    ];
    let flags = [
        "--config",
        "f.yaml",
        "--name",
        "of-the-flag",
        "--listen-client",
        &client,
    ];
    let mut command = holdfastd(dir.path(), &flags, &variables);
    let _child = Child(
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    until("the node is ready", async || {
        matches!(http_get(ports[2], "/readyz").await, Ok((200, _)))
    })
    .await?;
    let status = Client::builder()
        .endpoints([client.clone()])
        .build()?
        .cluster()
        .status()
        .await?;
    let node = &status.nodes[0];
    assert_eq!(
        (
            node.name.as_str(),
            node.region.as_str(),
            node.client_address.as_str()
        ),
        ("of-the-flag", "of-the-variable", client.as_str())
    );

    for (name, value, reason) in [
        ("HOLDFAST__NODE__NMAE", "x", "unknown key `nmae` in `node`"),
        (
            "HOLDFAST__READS__SESSION_WAIT",
            "5",
            "the bare number 5 is not a time",
        ),
        ("HOLDFAST__SECRETS__TOKEN", "hunter2", "is inline"),
    ] {
        let ended = holdfastd(dir.path(), &[], &[(name, value)]).output()?;
        let said = said(&ended);
        assert_eq!(ended.status.code(), MISCONFIGURED);
        assert!(
            said.starts_with(&format!("{name}: "))
                && said.contains(reason)
                && !said.contains("hunter2"),
            "{said}"
        );
    }
    Ok(())
}
