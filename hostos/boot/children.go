package boot

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// children starts processes and reaps every child of this process, including
// the orphans that PID 1 inherits. Nothing else in the program may wait.
type children struct {
	mu      sync.Mutex
	waiting map[int]chan<- syscall.WaitStatus
}

func newChildren() *children {
	return &children{waiting: make(map[int]chan<- syscall.WaitStatus)}
}

// start forks argv0 and returns its pid and a channel that gives its status
// once. Netns is the path of the network namespace to start it in, or empty.
func (c *children) start(argv0 string, argv []string, attr *syscall.ProcAttr, netns string) (int, <-chan syscall.WaitStatus, error) {
	exited := make(chan syscall.WaitStatus, 1)
	c.mu.Lock() // a child that ends at once must not be reaped before it is known
	defer c.mu.Unlock()
	pid, err := forkIn(netns, argv0, argv, attr)
	if err != nil {
		return 0, nil, fmt.Errorf("start %v: %w", argv, err)
	}
	c.waiting[pid] = exited
	return pid, exited, nil
}

// forkIn forks while the calling thread is in the network namespace netns.
func forkIn(netns, argv0 string, argv []string, attr *syscall.ProcAttr) (int, error) {
	if netns == "" {
		return syscall.ForkExec(argv0, argv, attr)
	}
	var pid int
	err := inNetns(netns, func() (err error) {
		pid, err = syscall.ForkExec(argv0, argv, attr)
		return err
	})
	return pid, err
}

// reap waits for every child that has ended by now.
func (c *children) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if ch, ok := c.waiting[pid]; ok {
			delete(c.waiting, pid)
			_ = syscall.Kill(-pid, syscall.SIGKILL) // what it left behind in its group
			ch <- ws
		}
	}
}

// signal sends sig to the process group of a child that has not been reaped,
// so that a number used again by another process is never hit.
func (c *children) signal(pid int, sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.waiting[pid]; ok {
		_ = syscall.Kill(-pid, sig) // gone already: reap comes next
	}
}

// run reaps until ctx is done.
func (c *children) run(ctx context.Context) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	defer signal.Stop(ended)
	for {
		c.reap()
		select {
		case <-ctx.Done():
			return
		case <-ended:
		}
	}
}
