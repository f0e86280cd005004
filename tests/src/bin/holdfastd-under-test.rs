//! The server as a child process of the tests: the same `main` as `holdfastd`, built with the tests
//! so that it is never stale.

fn main() -> std::process::ExitCode {
    holdfast_node::main()
}
