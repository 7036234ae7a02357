// Package docs holds the documents of the project. Its test keeps the rules of
// the tree that the documents state: import directions, package comments,
// formatting, and that every package is named in architecture.md.
package docs
