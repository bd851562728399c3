//! Import cycles: between files, and between the modules of a folder.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use crate::{
    imports::Import,
    modules::{Crate, ModulePath},
};

/// For each node, the nodes that it imports from, each with one imported name.
type Graph<N> = BTreeMap<N, BTreeMap<N, String>>;

/// One line for each import cycle of files.
pub(crate) fn between_files(source: &Crate, imports: &BTreeSet<Import>) -> Vec<String> {
    let mut graph = Graph::<PathBuf>::new();
    for import in imports {
        let file = |path: &ModulePath| source.modules.get(path).map(|module| module.file.clone());
        if let (Some(from), Some(to)) = (file(&import.from), file(&import.to))
            && from != to
        {
            graph.entry(from).or_default().insert(to, import.name.clone());
        }
    }
    report(&graph, |file| file.display().to_string())
}

/// One line for each import cycle of modules that have the same parent. An import by or from a descendant of a module
/// counts as one of the module.
pub(crate) fn between_modules(source: &Crate, imports: &BTreeSet<Import>) -> Vec<String> {
    let parents: BTreeSet<&[String]> = source
        .modules
        .keys()
        .filter_map(|path| Some(path.split_last()?.1))
        .collect();
    let mut lines = Vec::new();
    for parent in parents {
        let mut graph = Graph::<ModulePath>::new();
        for import in imports {
            let child = |path: &ModulePath| {
                (path.starts_with(parent) && path.len() > parent.len()).then(|| path[..=parent.len()].to_vec())
            };
            if let (Some(from), Some(to)) = (child(&import.from), child(&import.to))
                && from != to
            {
                graph.entry(from).or_default().insert(to, import.name.clone());
            }
        }
        lines.extend(report(&graph, |path| path.join("::")));
    }
    lines
}

fn report<N: Ord + Clone>(graph: &Graph<N>, text: impl Fn(&N) -> String) -> Vec<String> {
    let mut lines = Vec::new();
    for cycle in components(graph) {
        let mut line = format!("import cycle of {}:", cycle.len());
        for from in &cycle {
            for (to, name) in graph.get(from).into_iter().flatten() {
                if cycle.contains(to) {
                    line.push_str(&format!(" {} -> {} ({name});", text(from), text(to)));
                }
            }
        }
        lines.push(line);
    }
    lines
}

/// The sets of at least two nodes that reach each other.
fn components<N: Ord + Clone>(graph: &Graph<N>) -> Vec<BTreeSet<N>> {
    let reach: BTreeMap<&N, BTreeSet<&N>> = graph.keys().map(|node| (node, reachable(graph, node))).collect();
    let mut found = BTreeSet::new();
    for (node, reached) in &reach {
        let cycle: BTreeSet<N> = reached
            .iter()
            .filter(|other| reach.get(*other).is_some_and(|back| back.contains(node)))
            .map(|other| (*other).clone())
            .collect();
        if cycle.len() > 1 {
            found.insert(cycle);
        }
    }
    found.into_iter().collect()
}

fn reachable<'g, N: Ord>(graph: &'g Graph<N>, from: &'g N) -> BTreeSet<&'g N> {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(node) = next.pop() {
        for to in graph.get(node).into_iter().flat_map(BTreeMap::keys) {
            if seen.insert(to) {
                next.push(to);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(arrows: &[(&'static str, &'static str)]) -> Graph<&'static str> {
        let mut graph = Graph::new();
        for (from, to) in arrows {
            graph
                .entry(*from)
                .or_insert_with(BTreeMap::new)
                .insert(*to, String::new());
        }
        graph
    }

    #[test]
    fn cycle_contains_only_nodes_that_reach_each_other() {
        let graph = graph(&[("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]);
        assert_eq!(components(&graph), [BTreeSet::from(["b", "c"])]);
    }

    #[test]
    fn graph_without_a_cycle_has_no_findings() {
        assert!(components(&graph(&[("a", "b"), ("a", "c"), ("b", "c")])).is_empty());
    }
}
