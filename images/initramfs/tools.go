//go:build tools

package initramfs

// What u-root's commands import and nothing of ours does. Named here, go mod
// tidy keeps it although the commands are compiled by gobusybox only.
import (
	_ "github.com/dustin/go-humanize"
	_ "golang.org/x/term"
)
