//! What of buf's STANDARD rules can be seen in the compiled contract, so that they hold where there
//! is no buf. The whole set is asked for in `proto/buf.yaml`.

use std::collections::{HashMap, HashSet};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

use super::source::none;

#[test]
fn the_contract_keeps_bufs_standard_rules() {
    let files = files();
    assert!(files.len() >= 4, "only {} files", files.len());
    none(
        "the contract",
        files.iter().flat_map(broken).chain(shared_messages(&files)),
    );
}

#[test]
fn the_lint_finds_what_it_looks_for() {
    let count = |change: fn(&mut FileDescriptorProto)| {
        let mut files = files();
        let file = files
            .iter_mut()
            .find(|file| file.name().ends_with("v1/cache.proto"))
            .unwrap();
        change(file);
        broken(file).len() + shared_messages(&files).len()
    };
    assert_eq!(count(|_| ()), 0);
    assert_eq!(count(|file| file.package = Some("holdfast.v2".into())), 1);
    assert_eq!(
        count(|file| file.name = Some("holdfast/v1/Cache.proto".into())),
        1
    );
    assert_eq!(count(|file| file.syntax = None), 1);
    assert_eq!(count(|file| file.public_dependency = vec![0]), 1);
    assert_eq!(
        count(|file| file.enum_type[0].value[0].name = Some("CONSISTENCY_NONE".into())),
        1
    );
    assert_eq!(count(|file| file.enum_type[0].value[0].number = Some(9)), 1);
    assert_eq!(
        count(|file| file.enum_type[0].value[1].name = Some("SESSION".into())),
        1
    );
    assert_eq!(
        count(|file| file.message_type[0].field[0].name = Some("clientId".into())),
        1
    );
    assert_eq!(
        count(|file| file.message_type[0].name = Some("request_id".into())),
        1
    );
    assert_eq!(count(|file| file.service[0].name = Some("Cache".into())), 1);
    assert_eq!(
        count(|file| file.service[0].method[0].input_type = Some(".holdfast.v1.Answer".into())),
        1
    );
    assert_eq!(
        count(|file| file.service[0].method[1] = file.service[0].method[0].clone()),
        2
    );
}

fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(holdfast_proto::DESCRIPTORS)
        .expect("the build script encoded them");
    set.file
        .into_iter()
        .filter(|file| file.package().starts_with("holdfast."))
        .collect()
}

fn broken(file: &FileDescriptorProto) -> Vec<String> {
    let (dir, name) = file.name().rsplit_once('/').unwrap_or(("", file.name()));
    let version = file
        .package()
        .rsplit('.')
        .next()
        .and_then(|part| part.strip_prefix('v'))
        .unwrap_or_default();
    let mut broken = Broken {
        file: file.name(),
        found: Vec::new(),
    };
    broken.unless(dir == file.package().replace('.', "/"), || {
        format!("package {} is not its directory", file.package())
    });
    broken.unless(
        version.parse().is_ok_and(|version: u32| version > 0),
        || format!("package {} has no version", file.package()),
    );
    broken.unless(name.strip_suffix(".proto").is_some_and(is_snake), || {
        "the file's name is not lower_snake_case".into()
    });
    broken.unless(file.syntax() == "proto3", || "not proto3".into());
    broken.unless(
        file.public_dependency.is_empty() && file.weak_dependency.is_empty(),
        || "a public or weak import".into(),
    );
    file.enum_type
        .iter()
        .for_each(|one| broken.enumeration(one));
    file.message_type.iter().for_each(|one| broken.message(one));
    file.service.iter().for_each(|one| broken.service(one));
    broken.found
}

/// A message that two RPCs use cannot change for one of them.
fn shared_messages(files: &[FileDescriptorProto]) -> Vec<String> {
    let mut users: HashMap<&str, usize> = HashMap::new();
    let methods = files
        .iter()
        .flat_map(|file| &file.service)
        .flat_map(|service| &service.method);
    methods.for_each(|method| {
        [method.input_type(), method.output_type()]
            .iter()
            .for_each(|name| *users.entry(name).or_default() += 1)
    });
    users
        .iter()
        .filter(|(_, count)| **count > 1)
        .map(|(name, count)| format!("  {name} is used by {count} RPCs"))
        .collect()
}

struct Broken<'a> {
    file: &'a str,
    found: Vec<String>,
}

impl Broken<'_> {
    fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.found.push(format!("  {}: {}", self.file, what()));
        }
    }

    fn enumeration(&mut self, one: &EnumDescriptorProto) {
        let prefix = upper_snake(one.name());
        let zero = one
            .value
            .iter()
            .find(|value| value.number() == 0)
            .map(|value| value.name().to_owned());
        self.unless(is_pascal(one.name()), || {
            format!("enum {} is not PascalCase", one.name())
        });
        self.unless(zero == Some(format!("{prefix}_UNSPECIFIED")), || {
            format!("enum {}: 0 is not {prefix}_UNSPECIFIED", one.name())
        });
        for value in one.value.iter().filter(|value| value.number() != 0) {
            let is_right = value.name().starts_with(&format!("{prefix}_"))
                && value.name().chars().all(|letter| !letter.is_lowercase());
            self.unless(is_right, || {
                format!("enum {}: {} is not {prefix}_…", one.name(), value.name())
            });
        }
        let numbers: HashSet<i32> = one.value.iter().map(|value| value.number()).collect();
        self.unless(numbers.len() == one.value.len(), || {
            format!("enum {} has aliases", one.name())
        });
    }

    fn message(&mut self, one: &DescriptorProto) {
        self.unless(is_pascal(one.name()), || {
            format!("message {} is not PascalCase", one.name())
        });
        let fields = one.field.iter().map(|field| field.name());
        // Those that begin with `_` are how an `optional` field is compiled.
        let oneofs = one
            .oneof_decl
            .iter()
            .map(|oneof| oneof.name())
            .filter(|name| !name.starts_with('_'));
        for name in fields.chain(oneofs) {
            self.unless(is_snake(name), || {
                format!("{}.{name} is not lower_snake_case", one.name())
            });
        }
        one.enum_type
            .iter()
            .for_each(|inner| self.enumeration(inner));
        one.nested_type.iter().for_each(|inner| self.message(inner));
    }

    fn service(&mut self, one: &ServiceDescriptorProto) {
        self.unless(
            is_pascal(one.name()) && one.name().ends_with("Service"),
            || format!("service {} is not …Service", one.name()),
        );
        for method in &one.method {
            self.unless(is_pascal(method.name()), || {
                format!("{}.{} is not PascalCase", one.name(), method.name())
            });
            for (used, suffix) in [
                (method.input_type(), "Request"),
                (method.output_type(), "Response"),
            ] {
                let used = used.rsplit('.').next().unwrap_or(used);
                let usual = format!("{}{suffix}", method.name());
                let is_right = used == usual || used == format!("{}{usual}", one.name());
                self.unless(is_right, || {
                    format!("{}.{}: {used} is not {usual}", one.name(), method.name())
                });
            }
        }
    }
}

fn is_snake(name: &str) -> bool {
    let letters =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(letters)
        && !name.contains("__")
}

fn is_pascal(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_uppercase())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric())
}

/// `FetchOnMiss`: `FETCH_ON_MISS`.
fn upper_snake(name: &str) -> String {
    let mut snake = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_uppercase());
    }
    snake
}
