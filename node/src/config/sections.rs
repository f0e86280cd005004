//! The sections of a node itself: who it is, where it listens, what it may use.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_proto::limits::VALUE_BYTES_MAX;

use super::error::{ConfigError, Place, Problems};
use super::fields::{Fields, Keys, Set, WAIT_MAX, check_name};
use super::layers::Environment;
use super::tree::{Tree, Value};
use super::{
    Address, Advertise, Cluster, Config, Engine, Listen, Memory, Node, Places, Reads, Role,
    Security, Storage,
};
use super::{policies, upstreams};

pub(super) const TOP: Keys = Keys {
    built: &[
        "node",
        "listen",
        "advertise",
        "cluster",
        "secrets",
        "upstreams",
        "policies",
        "storage",
        "memory",
        "reads",
        "security",
    ],
    not_built: &[],
};
pub(super) const NODE: Keys = Keys {
    built: &["name", "region", "role", "data_dir"],
    not_built: &[],
};
pub(super) const LISTEN: Keys = Keys {
    built: &["client", "peer", "admin"],
    not_built: &[],
};
pub(super) const ADVERTISE: Keys = Keys {
    built: &["client", "peer"],
    not_built: &[],
};
pub(super) const CLUSTER: Keys = Keys {
    built: &["expect", "discover", "shards"],
    not_built: &[],
};
pub(super) const STORAGE: Keys = Keys {
    built: &["engine", "max_bytes", "log_keep_entries", "log_keep_bytes"],
    not_built: &[],
};
pub(super) const MEMORY: Keys = Keys {
    built: &["max_bytes"],
    not_built: &[],
};
pub(super) const READS: Keys = Keys {
    built: &["session_wait"],
    not_built: &[],
};
pub(super) const SECURITY: Keys = Keys {
    built: &["insecure"],
    not_built: &["tls", "auth", "tokens", "access"],
};

/// Nodes that may form a cluster; far more than voters make sense.
const EXPECT_MAX: u64 = 64;
const SHARDS_MAX: u64 = 256;
const LOG_KEEP_ENTRIES_DEFAULT: u64 = 100_000;
const LOG_KEEP_BYTES_DEFAULT: u64 = 512 << 20;
/// Less holds neither a log nor a snapshot of anything.
const STORAGE_BYTES_MIN: u64 = 16 << 20;
/// One log entry may be as large as the largest value.
const LOG_KEEP_BYTES_MIN: u64 = VALUE_BYTES_MAX as u64;
/// More is a slip of the unit.
const SIZE_MAX: u64 = 1 << 50;
const SESSION_WAIT_DEFAULT: Duration = Duration::from_millis(100);

pub(super) fn read(tree: Tree, environment: &Environment) -> Result<Config, ConfigError> {
    let problems = Problems::default();
    let mut top = Fields::open("", without_anchors(tree), &TOP, &problems);
    let (node, name_place, data_dir_place, role_place) = node(top.section("node", &NODE));
    let security = security(top.section("security", &SECURITY));
    let (listen, listen_places) = listen(top.section("listen", &LISTEN), &security);
    let advertise = advertise(
        top.section("advertise", &ADVERTISE),
        &listen,
        &listen_places,
    );
    let cluster = cluster(top.section("cluster", &CLUSTER));
    if node.role == Role::Learner && cluster.discover.is_empty() {
        problems.add(&role_place, "`node.role: learner` needs `cluster.discover`: a learner joins a cluster and founds none");
    }
    let (storage, engine) = storage(top.section("storage", &STORAGE));
    let secrets = upstreams::secrets(top.take("secrets"), environment, &problems);
    let declared = upstreams::upstreams(top.take("upstreams"), &secrets, &problems);
    let policies = policies::policies(top.list("policies"), &declared, &problems);
    let memory = Memory {
        max_bytes: top
            .section("memory", &MEMORY)
            .size("max_bytes", VALUE_BYTES_MAX as u64..=SIZE_MAX),
    };
    let reads = Reads {
        session_wait: top
            .section("reads", &READS)
            .duration("session_wait", Duration::ZERO..=WAIT_MAX)
            .unwrap_or(SESSION_WAIT_DEFAULT),
    };
    problems.finish()?;
    let [client, peer, admin] = listen_places;
    Ok(Config {
        node,
        listen,
        advertise,
        cluster,
        secrets: Arc::new(secrets.into_known()),
        upstreams: declared.into_upstreams(),
        policies,
        storage,
        memory,
        reads,
        security,
        places: Places {
            name: name_place,
            data_dir: data_dir_place,
            engine,
            client,
            peer,
            admin,
        },
    })
}

/// Top-level keys `x-…` hold what is used elsewhere by YAML's anchors, as in compose files.
fn without_anchors(mut tree: Tree) -> Tree {
    if let Value::Map(entries) = &mut tree.value {
        entries.retain(|(key, _)| !key.name.starts_with("x-"));
    }
    tree
}

fn named(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

fn node(mut fields: Fields<'_>) -> (Node, Place, Place, Place) {
    let role_place = fields.place_of("role");
    let default = |place: &'static str| Place::Default(place);
    let had_name = fields.has("name");
    let name = fields.parsed("name", named).unwrap_or_else(|| {
        let place = default("node.name");
        let value = if had_name {
            String::new()
        } else {
            host_name(&place, fields.problems)
        };
        Set { value, place }
    });
    let region = fields.parsed("region", |text| {
        if text.is_empty() {
            Ok(String::new())
        } else {
            named(text)
        }
    });
    let role = fields.choice(
        "role",
        &[("voter", Role::Voter), ("learner", Role::Learner)],
    );
    let path = |text: &str| {
        if text.is_empty() {
            Err("the path is empty")
        } else {
            Ok(PathBuf::from(text))
        }
    };
    let data_dir = fields.parsed("data_dir", path);
    let data_dir = data_dir.unwrap_or_else(|| Set {
        value: PathBuf::from("./holdfast-data"),
        place: default("node.data_dir"),
    });
    let node = Node {
        name: name.value,
        region: region.map(|set| set.value).unwrap_or_default(),
        role: role.map_or(Role::Voter, |set| set.value),
        data_dir: data_dir.value,
    };
    (node, name.place, data_dir.place, role_place)
}

fn host_name(place: &Place, problems: &Problems) -> String {
    let name = hostname::get()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    if let Err(reason) = check_name(&name) {
        problems.add(
            place,
            format!("the host name does not do: {reason}; set `node.name`"),
        );
    }
    name
}

fn security(mut fields: Fields<'_>) -> Security {
    Security {
        insecure: fields.boolean("insecure").unwrap_or(false),
    }
}

fn listen(mut fields: Fields<'_>, security: &Security) -> (Listen, [Place; 3]) {
    let mut one = |key: &str, name: &'static str, port: u16| {
        let parse = |text: &str| {
            let example = format!(
                "`{text}` is not an IP address and a port: write it like `127.0.0.1:{port}` or `\"[::1]:{port}\"`"
            );
            text.parse::<SocketAddr>().map_err(|_| example)
        };
        let default = || Set {
            value: SocketAddr::from(([127, 0, 0, 1], port)),
            place: Place::Default(name),
        };
        let set = fields.parsed(key, parse).unwrap_or_else(default);
        if !set.value.ip().to_canonical().is_loopback() && !security.insecure {
            let reason = format!(
                "`{name}` {} is not on loopback, which needs TLS and authentication; `security: {{insecure: true}}` does without",
                set.value
            );
            fields.problems.add(&set.place, reason);
        }
        set
    };
    let client = one("client", "listen.client", 7400);
    let peer = one("peer", "listen.peer", 7401);
    let admin = one("admin", "listen.admin", 7402);
    for (later, earlier, names) in [
        (&peer, &client, "`listen.peer` and `listen.client`"),
        (&admin, &client, "`listen.admin` and `listen.client`"),
        (&admin, &peer, "`listen.admin` and `listen.peer`"),
    ] {
        if collide(later.value, earlier.value) {
            // A default collides only because of what was set.
            let place = if matches!(later.place, Place::Default(_)) {
                &earlier.place
            } else {
                &later.place
            };
            fields.problems.add(
                place,
                format!("{names} have the same port {}", later.value.port()),
            );
        }
    }
    let listen = Listen {
        client: client.value,
        peer: peer.value,
        admin: admin.value,
    };
    (listen, [client.place, peer.place, admin.place])
}

fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let same_ip =
        one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && same_ip
}

fn advertise(mut fields: Fields<'_>, listen: &Listen, places: &[Place; 3]) -> Advertise {
    let mut one = |key: &str, listen: SocketAddr, listen_place: &Place| {
        let had = fields.has(key);
        let parse = |text: &str| {
            let address: Address = text.parse()?;
            if matches!(address.host.as_str(), "0.0.0.0" | "::") {
                return Err(format!(
                    "nobody can dial `{text}`: name an address of this node"
                ));
            }
            Ok(address)
        };
        let set = fields.parsed(key, parse);
        if !had && listen.ip().is_unspecified() {
            let reason = format!(
                "`listen.{key}` {listen} is a wildcard: `advertise.{key}` must say where others reach this node"
            );
            fields.problems.add(listen_place, reason);
        }
        set.map_or_else(|| Address::from(listen), |set| set.value)
    };
    Advertise {
        client: one("client", listen.client, &places[0]),
        peer: one("peer", listen.peer, &places[1]),
    }
}

fn cluster(mut fields: Fields<'_>) -> Cluster {
    let had_expect = fields.has("expect");
    let expect = fields.integer("expect", 1..=EXPECT_MAX);
    let discover_place = fields.place_of("discover");
    let items = fields.texts("discover");
    let asked = !items.is_empty();
    let mut discover = Vec::new();
    for Set { value, place } in items {
        match value.parse::<Address>() {
            Ok(address) if !discover.contains(&address) => discover.push(address),
            Ok(_) => fields
                .problems
                .add(&place, format!("`cluster.discover` names `{value}` twice")),
            Err(reason) => fields
                .problems
                .add(&place, format!("`cluster.discover`: {reason}")),
        }
    }
    match (&expect, asked) {
        (None, true) if !had_expect => {
            let reason =
                "`cluster.discover` needs `cluster.expect`: how many nodes form the cluster";
            fields.problems.add(&discover_place, reason);
        }
        (Some(expect), false) if expect.value > 1 => {
            let reason = format!(
                "`cluster.expect` {} needs `cluster.discover`: where the other nodes are",
                expect.value
            );
            fields.problems.add(&expect.place, reason);
        }
        _ => {}
    }
    let shards = fields
        .integer("shards", 1..=SHARDS_MAX)
        .map_or(1, |set| set.value);
    Cluster {
        expect: expect.map_or(1, |set| set.value),
        discover,
        shards: u16::try_from(shards).unwrap_or(1),
    }
}

fn storage(mut fields: Fields<'_>) -> (Storage, Place) {
    let engine = fields.choice(
        "engine",
        &[("rocksdb", Engine::Rocksdb), ("memory", Engine::Memory)],
    );
    let engine = engine.unwrap_or(Set {
        value: Engine::Rocksdb,
        place: Place::Default("storage.engine"),
    });
    let storage = Storage {
        engine: engine.value,
        max_bytes: fields.size("max_bytes", STORAGE_BYTES_MIN..=SIZE_MAX),
        log_keep_entries: fields
            .integer("log_keep_entries", 1..=u64::MAX)
            .map_or(LOG_KEEP_ENTRIES_DEFAULT, |set| set.value),
        log_keep_bytes: fields
            .size("log_keep_bytes", LOG_KEEP_BYTES_MIN..=SIZE_MAX)
            .unwrap_or(LOG_KEEP_BYTES_DEFAULT),
    };
    (storage, engine.place)
}
