//! The facts of every method that clients may call, in one table: what it is called, whether it may
//! change something, and which room it takes.

/// One method.
#[derive(Debug, PartialEq, Eq)]
pub struct Method {
    /// Its label in metrics and traces.
    pub name: &'static str,
    /// Its gRPC path begins so, and is so where it names a method.
    path: &'static str,
    pub kind: Kind,
    /// It may change something: only there does it matter whether it was applied.
    pub is_mutation: bool,
    /// Its request carries a value.
    pub has_value: bool,
}

/// Which room an operation takes: so that what waits for a quorum, for an operator or for ever keeps
/// no read out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Answered from memory, unless it says that it waits.
    Read,
    /// Waits for a quorum.
    Write,
    /// An operator's change, which may take a while.
    Operator,
    /// A probe's or an operator's look.
    Probe,
    /// A stream that has no end of its own.
    Endless,
}

pub const KINDS: [Kind; 5] = [
    Kind::Read,
    Kind::Write,
    Kind::Operator,
    Kind::Probe,
    Kind::Endless,
];

const fn method(name: &'static str, path: &'static str, kind: Kind, is_mutation: bool) -> Method {
    Method {
        name,
        path,
        kind,
        is_mutation,
        has_value: false,
    }
}

const fn read(name: &'static str, path: &'static str) -> Method {
    method(name, path, Kind::Read, false)
}

const fn write(name: &'static str, path: &'static str) -> Method {
    method(name, path, Kind::Write, true)
}

const fn operator(name: &'static str, path: &'static str) -> Method {
    method(name, path, Kind::Operator, true)
}

/// The most used first. Held against the descriptors by a test.
pub static METHODS: [Method; 16] = [
    read("Get", "/holdfast.v1.CacheService/Get"),
    read("BatchGet", "/holdfast.v1.CacheService/BatchGet"),
    Method {
        has_value: true,
        ..write("Set", "/holdfast.v1.CacheService/Set")
    },
    write("Delete", "/holdfast.v1.CacheService/Delete"),
    write("Invalidate", "/holdfast.v1.CacheService/Invalidate"),
    read("Scan", "/holdfast.v1.CacheService/Scan"),
    read("Inspect", "/holdfast.v1.CacheService/Inspect"),
    method(
        "Status",
        "/holdfast.v1.ClusterService/Status",
        Kind::Probe,
        false,
    ),
    operator("AddMember", "/holdfast.v1.ClusterService/AddMember"),
    operator("Promote", "/holdfast.v1.ClusterService/Promote"),
    operator("Remove", "/holdfast.v1.ClusterService/Remove"),
    operator(
        "TransferLeader",
        "/holdfast.v1.ClusterService/TransferLeader",
    ),
    method(
        "health",
        "/grpc.health.v1.Health/Watch",
        Kind::Endless,
        false,
    ),
    method("health", "/grpc.health.", Kind::Probe, false),
    method("reflection", "/grpc.reflection.", Kind::Endless, false),
    // Whatever else is asked.
    method("other", "/", Kind::Read, false),
];

impl Kind {
    /// As metrics name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Operator => "operator",
            Self::Probe => "probe",
            Self::Endless => "endless",
        }
    }
}

impl Method {
    /// By its gRPC path.
    pub fn of(path: &str) -> &'static Self {
        let (last, named) = METHODS.split_last().expect("the table is not empty");
        named
            .iter()
            .find(|method| match method.path.ends_with('.') {
                true => path.starts_with(method.path),
                false => path == method.path,
            })
            .unwrap_or(last)
    }

    /// The rules answer it, and not a service that comes with gRPC.
    pub(crate) fn is_ours(&self) -> bool {
        self.path.starts_with("/holdfast.")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;

    use super::*;

    #[test]
    fn every_public_method_is_in_the_table() {
        let files = prost_types::FileDescriptorSet::decode(holdfast_proto::DESCRIPTORS)
            .unwrap()
            .file;
        let public = files
            .iter()
            .filter(|file| file.package() == "holdfast.v1")
            .flat_map(|file| &file.service);
        let described: BTreeSet<String> = public
            .flat_map(|service| {
                let path = |method: &str| format!("/holdfast.v1.{}/{method}", service.name());
                service.method.iter().map(move |method| path(method.name()))
            })
            .collect();
        let known: BTreeSet<String> = METHODS
            .iter()
            .map(|method| method.path.to_owned())
            .filter(|path| path.starts_with("/holdfast."))
            .collect();
        assert_eq!(described, known);
        for method in &METHODS {
            assert!(
                method.path.ends_with('.')
                    || method.path == "/"
                    || Method::of(method.path) == method
            );
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_one_thing() {
        for path in ["/holdfast.v2.CacheService/Get", "", "/", "Get", "/grpc.h"] {
            assert_eq!(Method::of(path).name, "other", "{path}");
        }
        let reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
        assert_eq!(Method::of(reflection).kind, Kind::Endless);
        let looked = Method::of("/grpc.health.v1.Health/Check");
        assert_eq!((looked.name, looked.kind), ("health", Kind::Probe));
    }

    #[test]
    fn what_may_change_something_waits_in_no_readers_room() {
        for method in &METHODS {
            let changes = [Kind::Write, Kind::Operator].contains(&method.kind);
            assert_eq!(method.is_mutation, changes, "{method:?}");
        }
    }
}
