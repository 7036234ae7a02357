//go:build lab

package main

// readerEnv has libfprint open its virtual reader, on which the lab puts
// pictures of fingers. Lab images only.
func readerEnv(dir string) []string { return []string{"FP_VIRTUAL_IMAGE=" + dir + "/reader"} }
