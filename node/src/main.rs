//! The server `holdfastd`. All of it is in the library, so that a test's binary can be it too.

fn main() -> std::process::ExitCode {
    holdfast_node::main()
}
