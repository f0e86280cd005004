//! What `dev` says once its cluster answers: what is indented are lines that work as pasted into
//! another shell.

use std::{
    env, fmt,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{Arguments, DEMO};
use crate::node::Node;

const CLIENT: &str = "holdfast";
/// Where the client looks when nobody says where.
const CLIENT_PORT_DEFAULT: u16 = 7400;

pub(super) struct Banner {
    client: String,
    first: SocketAddr,
    other: SocketAddr,
    admin: SocketAddr,
    nodes: usize,
    upstreams: Vec<(String, String)>,
}

impl Banner {
    pub(super) fn new(nodes: &[Node], arguments: &Arguments) -> Self {
        let (first, other) = (&nodes[0], nodes.get(1).unwrap_or(&nodes[0]));
        Self {
            client: client(
                env::var_os("PATH").as_deref(),
                env::current_exe().ok().as_deref(),
            ),
            first: first.client_address(),
            other: other.client_address(),
            admin: first.admin_address(),
            nodes: nodes.len(),
            upstreams: arguments
                .upstream
                .iter()
                .map(|upstream| (upstream.glob.clone(), upstream.url.clone()))
                .collect(),
        }
    }
}

impl fmt::Display for Banner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            first,
            other,
            admin,
            nodes,
            upstreams,
        } = self;
        let here = if first.port() == CLIENT_PORT_DEFAULT {
            client.clone()
        } else {
            format!("{client} -e {first}")
        };
        let noun = if *nodes == 1 { "node" } else { "nodes" };
        writeln!(
            f,
            "\nA cluster of {nodes} {noun} answers. In another shell:\n"
        )?;
        writeln!(f, "  {here} set greeting hello")?;
        writeln!(f, "  {client} -e {other} get greeting --raw")?;
        writeln!(f, "  {here} cluster status")?;
        writeln!(
            f,
            "  {here} get {DEMO}/1          # from an upstream, refreshed before it goes stale"
        )?;
        writeln!(f, "  {here} inspect {DEMO}/1")?;
        for (glob, url) in upstreams {
            writeln!(f, "\nKeys {glob} come from {url}")?;
        }
        write!(
            f,
            "\nMetrics: http://{admin}/metrics   Ready: http://{admin}/readyz   Stop: Ctrl-C"
        )
    }
}

/// `holdfast` if the shell finds it, else the one beside this program.
fn client(path: Option<&std::ffi::OsStr>, own: Option<&Path>) -> String {
    let on_path =
        path.is_some_and(|path| env::split_paths(path).any(|dir| is_executable(&dir.join(CLIENT))));
    let beside = || own.and_then(Path::parent).map(|dir| dir.join(CLIENT));
    if on_path {
        CLIENT.to_owned()
    } else {
        quoted(beside().unwrap_or_else(|| PathBuf::from(CLIENT)))
    }
}

fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// As a shell takes it for one word.
fn quoted(path: PathBuf) -> String {
    let text = path.to_string_lossy().into_owned();
    let is_plain = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte));
    if is_plain {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_client_is_the_one_that_the_shell_finds_or_the_one_beside() {
        let dir = tempfile::tempdir().unwrap();
        let own = Path::new("/opt/with space/holdfastd");
        let path = dir.path().as_os_str();
        assert_eq!(client(Some(path), Some(own)), "'/opt/with space/holdfast'");
        assert_eq!(
            client(None, Some(Path::new("/opt/holdfastd"))),
            "/opt/holdfast"
        );
        let file = dir.path().join("holdfast");
        fs::write(&file, "").unwrap();
        assert_ne!(
            client(Some(path), Some(own)),
            "holdfast",
            "it cannot be run"
        );
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(client(Some(path), Some(own)), "holdfast");
    }

    #[test]
    fn the_lines_name_the_port_where_it_is_not_the_usual_one() {
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let banner = |port: u16| Banner {
            client: "holdfast".into(),
            first: at(port),
            other: at(port + 10),
            admin: at(port + 2),
            nodes: 3,
            upstreams: Vec::new(),
        };
        let usual = banner(7400).to_string();
        assert!(
            usual.contains(
                "\n  holdfast set greeting hello\n  holdfast -e 127.0.0.1:7410 get greeting --raw\n"
            ),
            "{usual}"
        );
        assert!(
            banner(9000)
                .to_string()
                .contains("\n  holdfast -e 127.0.0.1:9000 set greeting hello\n")
        );
    }
}
