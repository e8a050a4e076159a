"""Many requests at once on one or several devices: a fair queue, slots in which sentences are spoken side by side, and
futures that hand out the sound as it is made.

    speech.py     what `submit` returns          job.py         a request and its sentences
    fair_queue.py whose turn it is               scheduler.py   queue, deadlines, cancellation, delivery in order
    device.py     what a device must offer       driver.py      one device's slots, turn by turn
    crowd.py      threads, rebuilding, closing   runner_device.py, ../gpu/crowd_device.py   devices
    plan.py       which devices, and what runs on each
    processes.py  several GPUs, a process for each      buffers.py     samples' memory, used again
"""
